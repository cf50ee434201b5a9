"""The program as a user meets it: runs that are killed go on as if nothing had been, bad input ends in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[3]
SMALLER = {
    "model.D": 32,
    "model.F": 48,
    "model.L": 2,
    "model.K": 8,
    "model.window_tokens": "(32,16)",
    "index.J": 16,
    "index.A": 2,
    "index.route_tokens": 64,
    "data.B": 4,
    "data.T": 128,
    "data.passkey_min_tokens": 128,
    "train.steps": 30,
    "train.start_steps": 10,
    "train.start_pattern": "ww",
    "train.start_window_tokens": "(32,48)",
    "train.warmup_steps": 2,
    "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 4,
    "train.evaluate_every_steps": 8,
    "evaluation.batches": 2,
    "evaluation.passkey_tokens": "(128,)",
    "evaluation.passkey_depths": 2,
    "evaluation.passkey_samples": 2,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty small documents of real text: pieces of this repository's own sources."""
    folder = tmp_path_factory.mktemp("corpus")
    text = b"\n".join(
        path.read_bytes() for path in sorted((ROOT / "bsa").rglob("*.py"))
    )
    for i in range(40):
        (folder / f"document_{i}.txt").write_bytes(text[i * 1500 : (i + 1) * 1500])
    return f"files:{folder}/*.txt"


def command(corpus, workdir, *flags, config="tiny.py", **knobs):
    knobs = SMALLER | {"data.source": corpus} | knobs
    return [
        *(
            sys.executable,
            "-m",
            "bsa.main",
            f"--config={ROOT}/configs/{config}",
            f"--workdir={workdir}",
        ),
        *(f"--config.{name}={value}" for name, value in knobs.items()),
        *flags,
    ]


def run(*args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs),
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def final_arrays(workdir):
    """All arrays of the newest checkpoint."""
    newest = max(
        int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()
    )
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(
            workdir.absolute() / "checkpoints" / str(newest) / "state"
        )
    return newest, tree


def wait_for_step(workdir, process, step):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if records(workdir)[-1]["step"] >= step:
                return
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.poll()}")


def start(corpus, workdir, log):
    return subprocess.Popen(command(corpus, workdir), cwd=ROOT, stdout=log, stderr=log)


def test_killed_run_ends_as_an_uninterrupted_one(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(corpus, whole).returncode == 0
    with open(tmp_path / "log", "w") as log:
        for signum, step in ((signal.SIGKILL, 6), (signal.SIGTERM, 14)):
            process = start(corpus, killed, log)
            wait_for_step(killed, process, step)
            process.send_signal(signum)
            code = process.wait(timeout=120)
            assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 0)
    stopped_at = final_arrays(killed)[0]
    assert 14 <= stopped_at < 30, (
        "SIGTERM leaves a checkpoint of the step it stopped at"
    )
    finished = run(corpus, killed)
    assert finished.returncode == 0, finished.stderr
    assert f"starting at step {stopped_at}" in finished.stderr

    (step_a, tree_a), (step_b, tree_b) = final_arrays(whole), final_arrays(killed)
    assert step_a == step_b == 30
    flat_a, flat_b = (dict(ocp.tree.to_flat_dict(tree)) for tree in (tree_a, tree_b))
    assert flat_a.keys() == flat_b.keys()
    for name, value in flat_a.items():
        np.testing.assert_array_equal(value, flat_b[name], err_msg=str(name))
    for a, b in zip(records(whole), records(killed), strict=True):
        drop = {"tokens_per_s"}
        assert {k: v for k, v in a.items() if k not in drop} == {
            k: v for k, v in b.items() if k not in drop
        }

    evaluation, expected = (
        json.loads((run / "evaluation.json").read_text()) for run in (killed, whole)
    )
    assert evaluation.pop("provenance").keys() == expected.pop("provenance").keys()
    assert evaluation == expected
    for name in (
        "bits_per_byte",
        "bits_per_byte_by_position",
        "passkey_accuracy",
        "attended_share",
        "num_params",
    ):
        assert name in evaluation
    assert {p.name for p in (killed / "figures").iterdir()} == {
        "loss.png",
        "bits_by_position.png",
        "passkeys.png",
        "selection.png",
    }
    again = run(corpus, killed, "--mode=evaluate", **{"evaluation.batches": 1})
    assert again.returncode == 0 and "held-out bits per byte" in again.stderr

    book = tmp_path / "book.txt"
    book.write_text("A short book, and its end. " * 9)
    flags = (f"--prompt_file={book}", "--question=Who?", "--decode.max_tokens=4")
    answered = run(corpus, killed, "--mode=generate", *flags)
    assert answered.returncode == 0 and "ms a token" in answered.stderr


BAD_INPUT = {
    "misspelt knob": ([], {"model.dd": 3}, "dd"),
    "impossible heads": ([], {"model.H": 3}, "H=3 is no multiple of G=2"),
    "ragged rows": (
        [],
        {"data.T": 100, "data.passkey_share": 0.0},
        "T=100 is no multiple of index.C=16",
    ),
    "unknown layer": ([], {"model.pattern": "wz"}, "pattern='wz'"),
    "short lists": ([], {"index.J": 1}, "J=1"),
    "missing corpus": ([], {"data.source": "files:/nowhere/*.txt"}, "/nowhere"),
    "unknown source": ([], {"data.source": "web"}, "stdlib, sotu"),
    "wrong type": ([], {"model.D": "wide"}, "wide"),
    "unknown mode": (["--mode=dance"], {}, "train"),
    "unknown flag": (["--modle=train"], {}, "modle"),
    "nothing to ask": (["--mode=generate"], {}, "holds no config.json"),
    "misspelt sampling": (["--decode.top_q=1"], {}, "top_q"),
    "nothing to evaluate": (["--mode=evaluate"], {}, "train first"),
    "too many devices": ([], {"mesh.data": 64}, "64"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line(case, corpus, tmp_path):
    flags, knobs, message = BAD_INPUT[case]
    result = run(corpus, tmp_path / "run", *flags, **knobs)
    one_line(result, message)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def one_line(result, message):
    complaint = [
        line for line in result.stderr.splitlines() if line.startswith("bsa: ")
    ]
    assert result.returncode not in (0, -signal.SIGABRT)
    assert len(complaint) == 1 and message in complaint[0], result.stderr
    assert "Traceback" not in result.stderr


def test_bad_workdirs_end_in_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(run(corpus, tmp_path / "file" / "run"), "cannot be written")
    made = tmp_path / "made"
    assert run(corpus, made, **{"train.steps": 3}).returncode == 0
    before = sorted(os.listdir(made / "checkpoints"))
    one_line(run(corpus, made, **{"model.D": 48}), "model.D=32, not 48")
    assert sorted(os.listdir(made / "checkpoints")) == before


def test_missing_and_wrong_config_files_end_in_one_line(corpus, tmp_path):
    one_line(run(corpus, tmp_path / "run", config="nothing.py"), "nothing.py")
    one_line(run(corpus, tmp_path / "run", config="small.py:sparse"), "sparse")
