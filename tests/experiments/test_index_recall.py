"""The recall table on a trained model's own keys: 1,024 bytes of Python, last bookmark layer of `tiny`.

`tiny_keys.npz` was made by `python -m experiments.index_recall --config=configs/tiny.py --workdir=runs/tiny --keys=...`.
"""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_table_of_a_trained_models_keys(tmp_path):
    keys = pathlib.Path(__file__).with_name("tiny_keys.npz")
    command = [sys.executable, "-m", "experiments.index_recall", f"--keys={keys}"]
    command += ["--choices=4", "--beam=2", f"--results={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "index_recall.json").read_text())["records"]
    assert len(rows) == 30, "six digests, by five kinds of route"
    for row in rows:
        assert 0 < row["mass_caught"] <= row["oracle_mass"] <= 1
        assert 0 < row["neighbour_overlap"] < 1
        if row["route"] == "flat":
            assert row["recall_of_flat"] == row["share_scored"] == 1
            assert row["share_proven"] == 1
        elif row["route"] == "chapters":
            assert 0.3 < row["recall_of_flat"] < 1 and row["share_scored"] < 1
        else:
            assert row["recall_of_flat"] > 0.3
        assert row["share_proven"] <= row["recall_of_flat"]
    assert (tmp_path / "index_recall.png").stat().st_size > 10_000
