"""Figures: a PNG comes out of ordinary data and of hardly any."""

import itertools

import numpy as np
import pytest
from PIL import Image

from bsa.train import figures


def assert_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors()) > 20  # ink of several shades


def make_records(num_steps):
    records = [
        {"step": step, "bits_per_byte": 8 / (1 + step / 100)}
        for step in range(10, num_steps + 1, 10)
    ]
    for record in records[9::10]:
        record["heldout_bits_per_byte"] = record["bits_per_byte"] + 0.3
    return records


@pytest.mark.parametrize(
    "records",
    [
        make_records(500),
        make_records(10),
        [],
        [{"step": 1, "bits_per_byte": None}],
        [{"step": 1, "heldout_bits_per_byte": 2.0}],
    ],
)
def test_loss_curve(tmp_path, records):
    figures.loss_curve(records, tmp_path / "loss.png")
    assert_png(tmp_path / "loss.png")


@pytest.mark.parametrize("num_buckets", [8, 1, 0])
def test_bits_by_position(tmp_path, num_buckets):
    edges = [0, *(64 << i for i in range(num_buckets))]
    buckets = [
        {"first": first, "last": end - 1, "bits_per_byte": 3 - 0.2 * i}
        for i, (first, end) in enumerate(itertools.pairwise(edges))
    ]
    evaluation = {"bits_per_byte_by_position": buckets}
    figures.bits_by_position(evaluation, tmp_path / "bits.png")
    assert_png(tmp_path / "bits.png")


@pytest.mark.parametrize(
    "tokens, depths", [((256, 1024, 4096), 5), ((256,), 1), ((), 0)]
)
def test_needle_map(tmp_path, tokens, depths):
    cells = [
        {"tokens": length, "depth": i / max(depths - 1, 1), "accuracy": 1 / (1 + i)}
        for length in tokens
        for i in range(depths)
    ]
    figures.needle_map(
        {"passkey_accuracy": cells[1:] or cells}, tmp_path / "needle.png"
    )
    assert_png(tmp_path / "needle.png")


@pytest.mark.parametrize("num_queries, num_keys", [(64, 128), (1, 1), (5, 3)])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_selection_picture(tmp_path, num_queries, num_keys, dtype):
    queries, keys = np.mgrid[:num_queries, :num_keys]
    last = (queries + 1) * num_keys // num_queries
    read_QN = ((keys < last) & (keys >= last - 6) | (keys < 1)).astype(dtype)
    path = tmp_path / "selection.png"
    figures.selection_picture(read_QN, path, query_block=32, key_block=16)
    assert_png(path)
    figures.selection_picture(np.zeros_like(read_QN), path)
    assert_png(path)
