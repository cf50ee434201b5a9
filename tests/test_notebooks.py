"""The notebooks run from top to bottom."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 25
    assert not any(cell.get("outputs") for cell in notebook.cells), "saved with outputs"
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=ROOT)
