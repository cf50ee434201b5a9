"""Writes `experiments/results/NAME.json`: flat records with where they came from. Every experiment calls it."""

import json
import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"


def write(
    name: str, origin: dict, records: list[dict], folder: pathlib.Path = RESULTS
) -> pathlib.Path:
    """Writes one result file.

    Args:
        origin: as `bsa.train.provenance` gives it, of the run that measured.
        records: flat: numbers, strings and None only.
    Raises:
        ValueError: a record is not flat.
    """
    for row in records:
        if nested := [
            key for key, value in row.items() if isinstance(value, dict | list | tuple)
        ]:
            raise ValueError(
                f"{name}: {', '.join(nested)} is not flat; one record is one row"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(origin | {"records": records}, indent=1) + "\n")
    return path


def merge(name: str, origin: dict, row: dict, cell: tuple[str, ...], folder=RESULTS):
    """Adds a record to a file, with its commit, in place of the one with the same values under the names in `cell`."""
    rows = [
        old
        for old in read(name, folder)["records"]
        if any(old.get(key) != row[key] for key in cell)
    ]
    return write(name, origin, [*rows, row | {"commit": origin["commit"]}], folder)


def read(name: str, folder: pathlib.Path = RESULTS) -> dict:
    """A result file, or one without records if it was never written."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"records": []}
