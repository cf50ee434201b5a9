"""Does bookmarking work? Trains and tests a table of methods, tasks and seeds, a cell at a time.

Command: python -m experiments.quality --suite=NAME [--methods=A,B] [--seeds=0,1] [--steps=1000] [--source=files:GLOB] [--list]
A cell is one method and seed, trained once and tested on every task of the suite (`experiments/quality_suites.py`).
What is in the workdir is kept, parameters and each test, so a run that was stopped goes on; methods whose first steps are
the same (`train.start_steps`) share them. After each cell, all that is there is collected into
experiments/results/quality.json, quality_NAME.md and quality_NAME.png. A cell that fails is told, and the others run; with
other than the suite's steps it is a table of its own, NAME_1000. LOG.md says which were run on a GPU.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
from absl import logging

from bsa.parallel import mesh as meshes
from bsa.train import provenance, settings, step
from experiments import quality_cell, quality_report, quality_suites, record


def main() -> None:
    """Runs a suite, or lists it."""
    flags = parse()
    logging.set_verbosity(logging.INFO)
    try:
        wanted = cells(flags.suite, flags.methods, flags.seeds, flags.steps)
        missing = missing_cells(wanted, flags.workdir, flags.source)
    except ValueError as error:
        sys.exit(f"quality: {error}")
    if flags.list:
        for cell in missing:
            print(size(cell, cell.run(flags.source)))
        return
    failed = []
    for cell in missing:
        try:
            write_cell(cell, flags.workdir, flags.source)
        except (
            *(ArithmeticError, OSError, RuntimeError),  # NaN, disk, device
            *(TypeError, ValueError),  # settings that do not fit each other
        ) as error:
            logging.exception("%s %s failed", cell.method, cell.seed)
            failed.append(f"{cell.method} {cell.seed}: {str(error)[:200]}")
        collect(flags.suite, flags.steps, flags.workdir, flags.results)
    if not missing:
        collect(flags.suite, flags.steps, flags.workdir, flags.results)
    if failed:
        sys.exit(f"quality: {len(failed)} cells failed: {'; '.join(failed)}")


def parse() -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=list(quality_suites.SUITES))
    parser.add_argument("--methods", type=_split, help="only these")
    parser.add_argument("--seeds", type=_split, help="only these")
    parser.add_argument("--steps", type=int, help="of training, not the suite's own")
    parser.add_argument("--source", help="text to learn, not the suite's own")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/quality")
    parser.add_argument("--results", type=pathlib.Path, default=record.RESULTS)
    parser.add_argument(
        "--list", action="store_true", help="missing cells and their sizes"
    )
    return parser.parse_args()


def cells(
    suite: str, methods=None, seeds=None, steps: int | None = None
) -> list[quality_cell.Cell]:
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
        quality_cell.Cell(suite, method, int(seed), steps)
        for seed in seeds or known.seeds
        for method in methods or known.methods
    ]


def size(cell: quality_cell.Cell, run: settings.RunSettings) -> str:
    """A line: parameters and tokens."""
    shapes = step.abstract_state(run, meshes.make_mesh(run.mesh)).params
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tokens = run.train.steps * run.data.B * run.data.T
    return (
        f"{cell.table} {cell.method} {cell.seed}: {num_params:,} parameters,"
        f" {run.train.steps:,} steps, {tokens:,} tokens"
    )


def missing_cells(
    wanted: list[quality_cell.Cell], workdir: pathlib.Path, source: str | None
) -> list[quality_cell.Cell]:
    """Those that are not in the workdir, or not with all of their tests.

    Raises:
        ValueError: one is there, but from other settings.
    """
    missing = []
    for cell in wanted:
        begun = read_cell(cell, workdir)
        if begun and begun["described"] != cell.described(source):
            raise ValueError(
                f"{cell.path(workdir)} was made with other settings; remove it, or use another --workdir"
            )
        if not begun or begun["tests_done"] < len(cell.parts.tests):
            missing.append(cell)
    return missing


def write_cell(
    cell: quality_cell.Cell, workdir: pathlib.Path, source: str | None
) -> None:
    """Trains and tests a cell, or goes on with one: parameters are kept, and every test as soon as it is done."""
    path, run = cell.path(workdir), cell.run(source)
    mesh = meshes.make_mesh(run.mesh)
    logging.info("%s", size(cell, run))
    begun = read_cell(cell, workdir)
    if begun:
        abstract = step.abstract_state(run, mesh).params
        params = quality_cell.load_arrays(path.with_suffix(".npz"), abstract)
    else:
        begin = time.monotonic()
        params = quality_cell.train(cell, run, mesh, workdir / "starts")
        logging.info("trained in %.0f s", time.monotonic() - begin)
        path.parent.mkdir(parents=True, exist_ok=True)
        quality_cell.save_arrays(path.with_suffix(".npz"), params)
        begun = {
            "described": cell.described(source),
            "origin": provenance.provenance(),
            "records": [],
            "tests_done": 0,
        }
        keep(path, begun)
    left = cell.parts.tests[begun["tests_done"] :]
    for records in quality_cell.test(cell, run, mesh, params, left):
        logging.info("%s", records[0])
        begun["records"] += records
        begun["tests_done"] += 1
        keep(path, begun)


def read_cell(cell: quality_cell.Cell, workdir: pathlib.Path) -> dict | None:
    """What is there of a trained cell."""
    path = cell.path(workdir)
    return json.loads(path.read_text()) if path.exists() else None


def keep(path: pathlib.Path, begun: dict) -> None:
    """Writes a cell, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(begun, indent=1) + "\n")
    unfinished.rename(path)


def collect(
    suite: str, steps: int | None, workdir: pathlib.Path, results: pathlib.Path
) -> None:
    """All that is there of the suite, in its own order, to results, table and figure."""
    wanted = cells(suite, steps=steps)
    found = [read_cell(cell, workdir) for cell in wanted]
    found = [begun for begun in found if begun]
    quality_report.write(wanted[0].table, found, results)


def _split(text):
    return text.split(",")


if __name__ == "__main__":
    main()
