"""Results are kept beside each other: by cell, with where they came from."""

import pytest

from experiments import record

CELL = ("device", "tokens")


def test_a_cell_takes_the_place_of_the_same_one_only(tmp_path):
    rows = [
        {"device": "x", "tokens": 1, "ms": 1.0},
        {"device": "y", "tokens": 1, "ms": 2.0},
        {"device": "x", "tokens": 1, "ms": 3.0},
    ]
    for commit, row in zip("abc", rows):
        record.merge("times", {"commit": commit, "date": "d"}, row, CELL, tmp_path)
    result = record.read("times", tmp_path)
    assert result["records"] == [rows[1] | {"commit": "b"}, rows[2] | {"commit": "c"}]
    assert result["commit"] == "c"


def test_records_are_flat(tmp_path):
    with pytest.raises(ValueError, match="times: ms is not flat"):
        record.write("times", {}, [{"ms": [1.0]}], tmp_path)
    assert record.read("times", tmp_path) == {"records": []}
