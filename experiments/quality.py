"""Does bookmarking work? Trains and tests a table of methods, tasks and seeds, a cell at a time.

Command: python -m experiments.quality --suite=NAME [--methods=A,B] [--seeds=0,1] [--source=files:GLOB] [--list]
A cell is one method and seed, trained once and tested on every task of the suite (`experiments/quality_suites.py`).
Cells that are in the workdir are kept, so a run that was stopped goes on; after each, all that are there are collected
into experiments/results/quality.json, quality_NAME.md and quality_NAME.png. Not run on a GPU yet.
"""

import json
import pathlib
import sys
import time

import jax
from absl import app, flags, logging

from bsa.parallel import mesh as meshes
from bsa.train import provenance, settings, step
from experiments import quality_cell, quality_report, quality_suites

_SUITE = flags.DEFINE_enum("suite", None, list(quality_suites.SUITES), "Which table.")
_METHODS = flags.DEFINE_list("methods", None, "Only these; all of the suite's else.")
_SEEDS = flags.DEFINE_list("seeds", None, "Only these; all of the suite's else.")
_SOURCE = flags.DEFINE_string("source", "stdlib", "Text of suites that read text.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quality", "Cells are kept here.")
_RESULTS = flags.DEFINE_string(
    "results", str(quality_report.RESULTS), "Folder of the results."
)
_LIST = flags.DEFINE_bool("list", False, "Only say what the cells are, and their size.")


def main(argv: list[str]) -> None:
    """Runs a suite, or lists it."""
    del argv
    logging.set_verbosity(logging.INFO)
    wanted = cells(_SUITE.value, _METHODS.value, _SEEDS.value)
    if _LIST.value:
        for cell in wanted:
            print(size(cell, cell.run(_SOURCE.value)))
    else:
        run_cells(
            wanted,
            pathlib.Path(_WORKDIR.value),
            pathlib.Path(_RESULTS.value),
            _SOURCE.value,
        )


def run_cells(
    wanted: list[quality_cell.Cell],
    workdir: pathlib.Path,
    results: pathlib.Path,
    source: str,
) -> None:
    """Trains and tests the cells that are not in the workdir, and collects after each.

    Raises:
        ValueError: a cell is there, but from other settings.
    """
    for cell in wanted:
        path, run = cell.path(workdir), cell.run(source)
        if not is_done(path, cell.described(run)):
            write_cell(path, cell, run)
        collect(cell.suite, workdir, results)


def cells(suite: str, methods=None, seeds=None) -> list[quality_cell.Cell]:
    """A suite's cells, seed by seed, or some of them.

    Raises:
        ValueError: the suite has no such method.
    """
    known = quality_suites.SUITES[suite]
    if unknown := set(methods or ()) - set(known.methods):
        raise ValueError(
            f"--methods: {', '.join(sorted(unknown))}; {suite} has {', '.join(known.methods)}"
        )
    return [
        quality_cell.Cell(suite, method, int(seed))
        for seed in seeds or known.seeds
        for method in methods or known.methods
    ]


def size(cell: quality_cell.Cell, run: settings.RunSettings) -> str:
    """A line: parameters and tokens."""
    shapes = step.abstract_state(run, meshes.make_mesh(run.mesh)).params
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tokens = run.train.steps * run.data.B * run.data.T
    return (
        f"{cell.suite} {cell.method} {cell.seed}: {num_params:,} parameters,"
        f" {run.train.steps:,} steps, {tokens:,} tokens"
    )


def is_done(path: pathlib.Path, described: str) -> bool:
    """Whether a cell is there.

    Raises:
        ValueError: it is, but from other settings.
    """
    if not path.exists():
        return False
    if json.loads(path.read_text())["described"] != described:
        raise ValueError(
            f"{path} was made with other settings; remove it, or use another --workdir"
        )
    return True


def write_cell(
    path: pathlib.Path, cell: quality_cell.Cell, run: settings.RunSettings
) -> None:
    """Trains and tests a cell, and writes it all at once."""
    logging.info("%s", size(cell, run))
    mesh = meshes.make_mesh(run.mesh)
    begin = time.monotonic()
    params = quality_cell.train(cell, run, mesh)
    trained = time.monotonic()
    records = quality_cell.test(cell, run, mesh, params)
    logging.info(
        "%.0f s, %.0f of them tests",
        time.monotonic() - begin,
        time.monotonic() - trained,
    )
    origin = provenance.provenance()
    found = {"described": cell.described(run), "origin": origin, "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.rename(path)


def collect(suite: str, workdir: pathlib.Path, results: pathlib.Path) -> None:
    """All finished cells of the suite, in its own order, to results, table and figure."""
    found = []
    for cell in cells(suite):
        path = cell.path(workdir)
        if path.exists():
            found.append(json.loads(path.read_text()))
    quality_report.write(suite, found, results)


def _parse(argv):
    """Flags; a missing suite is one line."""
    rest = flags.FLAGS(argv)
    if _SUITE.value is None:
        sys.exit(f"--suite is one of {', '.join(quality_suites.SUITES)}")
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
