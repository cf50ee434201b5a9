"""What the README shows works, and what it and RESULTS.md state comes from the result files."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_example_runs():
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert code[1].count("\n") <= 24
    done = subprocess.run(
        [sys.executable, "-c", code[1]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < float(done.stdout) < 1


def test_tables_are_those_of_the_results():
    command = [sys.executable, "-m", "experiments.tables", "--check"]
    subprocess.run(command, cwd=ROOT, check=True)
