"""The table of methods and tasks: its suites can be run, its smoke suite tells selection from a window."""

import contextlib
import dataclasses
import itertools
import json
import sys

import jax
import numpy as np
import pytest

from bsa.parallel import mesh as meshes
from bsa.tasks import catalogue
from experiments import (
    quality,
    quality_cell,
    quality_parts,
    quality_report,
    quality_suites,
)
from pallas_kernels import mosaic_gpu
from tests.bsa.tasks import metamath
from tests.experiments.test_index_recall import ROOT

COLUMNS = {
    *("suite", "task", "method", "seed", "length", "attended_tokens", "params"),
    *("train_tokens", "score", "chance", "refused_choices"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """With a text in place of set.mm, long enough for windows of a million tokens."""
    folder = tmp_path_factory.mktemp("cache")
    metamath.write(folder / "texts" / "setmm", 2**17)
    return folder


def run_suite(monkeypatch, workdir, results, *flags):
    """The command, without starting Python anew."""
    places = f"--workdir={workdir}", f"--results={results}"
    monkeypatch.setattr(sys, "argv", ["quality", *flags, *places])
    quality.main()


def test_smoke_suite(tmp_path, monkeypatch):
    """Window first, then all: what is there is kept, results hold all cells, and a cell that was stopped goes on."""
    workdir, results = tmp_path / "cells", tmp_path / "results"
    run_suite(monkeypatch, workdir, results, "--suite=smoke", "--methods=window")
    (kept,) = (workdir / "smoke").glob("*.json")
    before, written = json.loads(kept.read_text()), kept.stat().st_mtime_ns
    run_suite(monkeypatch, workdir, results, "--suite=smoke")
    assert kept.stat().st_mtime_ns == written
    assert not quality.missing_cells(quality.cells("smoke"), workdir, "stdlib")

    rows = json.loads((results / "quality.json").read_text())["records"]
    assert [row["method"] for row in rows] == ["dense", "window", "bookmark"]
    assert all(set(row) == COLUMNS | set(quality_report.ORIGIN) for row in rows)
    assert len({row["params"] for row in rows}) == 1
    dense, window, bookmark = rows
    assert bookmark["attended_tokens"] <= window["attended_tokens"] < 22
    assert dense["score"] > 0.9 and bookmark["score"] > 0.9
    assert window["score"] < 0.8, "a quarter of the text is out of its reach"
    assert "| bookmark |" in (results / "quality_smoke.md").read_text()
    assert (results / "quality_smoke.png").stat().st_size > 10_000

    # Stopped before its test: parameters are not trained again, and give the same.
    kept.write_text(json.dumps(before | {"records": [], "tests_done": 0}))
    monkeypatch.delattr(quality_cell, "train")
    run_suite(monkeypatch, workdir, results, "--suite=smoke")
    assert json.loads(kept.read_text()) == before


def test_text_suite(tmp_path, monkeypatch):
    """A suite that reads text reports bits, whole and by position, at lengths other than that of training too."""
    monkeypatch.setitem(quality_suites.SUITES, "text", TEXT)
    source = f"--source=files:{ROOT}/bsa/**/*.py"
    run_suite(monkeypatch, tmp_path, tmp_path, "--suite=text", source)
    rows = json.loads((tmp_path / "quality.json").read_text())["records"]
    lengths = {(row["task"], row["length"]) for row in rows}
    whole = {("bits_per_byte", 64), ("bits_per_byte", 128)}
    assert lengths >= whole | {("bits_of_64", 64), ("bits_of_128", 128)}
    assert all(1 < row["score"] < 9 and row["chance"] == 8 for row in rows)
    (tmp_path / "quality.json").unlink()
    run_suite(monkeypatch, tmp_path, tmp_path, "--suite=text", source)
    assert json.loads((tmp_path / "quality.json").read_text())["records"] == rows


def test_text_suite_that_asks(tmp_path, monkeypatch, cache):
    """A suite says itself what it learns; tasks test it beside text, several examples a row; --source goes before it."""
    asked = [
        quality_parts.Part("setmm_recall", length, {"last_distance": last}, samples=3)
        for length, last in ((256, 256), (512, 64))
    ]
    suite = dataclasses.replace(
        TEXT,
        base=TEXT.base | {"data.source": "setmm"},
        tests=[TEXT.tests[0], *asked],
    )
    monkeypatch.setitem(quality_suites.SUITES, "asked", suite)
    monkeypatch.setenv("BSA_CACHE", str(cache))
    (cell,) = quality.cells("asked", seeds=[0])
    assert cell.run(None).data.source == "setmm"
    assert cell.run("sotu").data.source == "sotu"
    run_suite(monkeypatch, tmp_path, tmp_path, "--suite=asked")
    rows = json.loads((tmp_path / "quality.json").read_text())["records"]
    assert all(set(row) == COLUMNS | set(quality_report.ORIGIN) for row in rows)
    assert [(row["task"], row["length"]) for row in rows if row["chance"] < 8] == [
        ("setmm_recall last_distance=256", 256),
        ("setmm_recall last_distance=64", 512),
    ]
    assert rows[0]["task"] == "bits_per_byte"
    assert all(0 <= row["score"] < 0.5 for row in rows[-2:])


TEXT = dataclasses.replace(
    quality_suites.SMOKE,
    base=quality_suites.SMOKE.base | {"model.V": 256, "model.L": 1, "train.steps": 12},
    methods={
        "dense": {
            "model.pattern": "d",
            "model.positions": "r",
            "model.window_tokens": (16,),
        }
    },
    train=[quality_parts.Part("text", 64)],
    tests=[quality_parts.Part("text", length, samples=2) for length in (64, 128)],
)


@pytest.mark.parametrize("name", quality_suites.SUITES)
def test_suites_are_sound(name, monkeypatch, cache):
    """Every method has valid settings, every task fits vocabulary, rows and blocks, and has room."""
    monkeypatch.setenv("BSA_CACHE", str(cache))
    suite = quality_suites.SUITES[name]
    lessons = [part for _, parts in suite.lessons for part in parts]
    rng = np.random.default_rng(0)
    for method in suite.methods:
        run = quality_cell.Cell(name, method, 0).run(None)
        index = run.model.index
        for part in itertools.chain(lessons, suite.train, suite.tests):
            assert part.num_tokens % index.C == part.num_tokens % index.query_block == 0
            quality_cell.Cell(name, method, 0).run(None, knobs=part.knobs)
            if quality_cell.is_text(part):
                continue
            assert part.task in catalogue.TASKS
            task = quality_cell.make_task(part, run)
            assert 0 < task.chance(part.num_tokens) < 1
        for part in itertools.chain(lessons, suite.train):
            assert run.data.T % part.num_tokens == 0
        assert all(part.samples > 0 for part in suite.tests)
    for part in itertools.chain(lessons, suite.train):
        if not quality_cell.is_text(part):
            task = quality_cell.make_task(part, run)
            assert task.draw(part.num_tokens, rng).answer_id_T.max() > 0


def test_lessons_fill_their_shares_of_the_steps(monkeypatch):
    """Each row of theirs asks for as many answers as they have, each row after them for one a text; from any step on."""
    lessons = [
        (share, [quality_parts.Part("selective_copy", 64, {"num_data": num})])
        for share, num in ((0.1, 7), (0.2, 5))
    ]
    suite = dataclasses.replace(quality_suites.SMOKE, lessons=lessons)
    monkeypatch.setitem(quality_suites.SUITES, "lessons", suite)
    cell = quality_cell.Cell("lessons", "dense", 0, steps=30)
    run = cell.run("stdlib")

    def batches(first):
        drawn = quality_cell.training_batches(cell, run, first)
        with contextlib.closing(iter(drawn)) as batches:
            return list(itertools.islice(batches, 30 - first))

    asked = [(batch["weight_BT"] > 0).sum(1).max() for batch in batches(0)]
    assert asked[:9] == [7] * 3 + [5] * 6 and max(asked[9:]) == 2
    for first in (2, 3, 7, 20):
        for one, same in zip(batches(first), batches(0)[first:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, same)


def test_methods_that_begin_alike_share_their_start(tmp_path, monkeypatch):
    """A method that goes on from another's first steps ends where it would have ended alone; others begin anew."""
    start = {"train.start_steps": 60, "train.start_pattern": "wd"}
    bookmark = quality_suites.SMOKE.methods["bookmark"] | start
    lesson = quality_parts.Part("selective_copy", 64, {"num_data": 7})
    suite = dataclasses.replace(
        quality_suites.SMOKE,
        methods={
            "bookmark": bookmark,
            "one_point": bookmark | {"index.R": 1},
            "narrow": bookmark | {"model.window_tokens": (8, 16)},
        },
        lessons=[(0.1, [lesson])],
    )
    monkeypatch.setitem(quality_suites.SUITES, "starts", suite)

    def trained(method, starts):
        cell = quality_cell.Cell("starts", method, 0, steps=20)
        run = cell.run("stdlib")
        params = quality_cell.train(cell, run, meshes.make_mesh(run.mesh), starts)
        return jax.device_get(params)

    alone = trained("one_point", tmp_path / "alone")
    shared = tmp_path / "shared"
    trained("bookmark", shared)
    (kept,) = shared.glob("*")
    begun = kept.stat().st_mtime_ns
    jax.tree.map(np.testing.assert_array_equal, trained("one_point", shared), alone)
    assert kept.stat().st_mtime_ns == begun
    trained("narrow", shared)
    assert len(list(shared.glob("*"))) == 2


def test_a_cell_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """And with other steps, the table is another."""
    written = []

    def write(cell, workdir, source):
        assert cell.run(source).train.steps == 20
        if cell.method == "window":
            raise FloatingPointError("loss nan at step 7")
        written.append(cell.path(workdir).relative_to(workdir).as_posix())

    monkeypatch.setattr(quality, "write_cell", write)
    with pytest.raises(SystemExit, match="1 cells failed: window 0.*nan at step 7"):
        run_suite(monkeypatch, tmp_path, tmp_path, "--suite=smoke", "--steps=20")
    assert written == ["smoke_20/dense-0.json", "smoke_20/bookmark-0.json"]


def test_other_settings_are_not_taken_for_the_same(tmp_path):
    (cell,) = quality.cells("smoke", ["dense"])
    path = cell.path(tmp_path)
    path.parent.mkdir()
    path.write_text(json.dumps({"described": "other"}))
    with pytest.raises(ValueError, match="other settings; remove it"):
        quality.missing_cells([cell], tmp_path, "stdlib")
    with pytest.raises(ValueError, match="dence; smoke has dense, window, bookmark"):
        quality.cells("smoke", ["dence"])


def test_results_of_other_suites_and_methods_stay(tmp_path):
    """And the range over seeds is told."""
    made = ("a", "m", 0.5), ("b", "m", 0.25), ("a", "n", 0.0), ("a", "m", 0.75)
    for suite, method, score in made:
        origin = {name: "x" for name in quality_report.ORIGIN}
        rows = [
            {"suite": suite, "task": "t", "method": method, "seed": seed, "length": 8}
            | {"attended_tokens": 4.0, "params": 1, "train_tokens": 1}
            | {"score": score + seed / 8, "chance": 0.1}
            for seed in (0, 1)
        ]
        quality_report.write(suite, [{"origin": origin, "records": rows}], tmp_path)
    rows = json.loads((tmp_path / "quality.json").read_text())["records"]
    assert sorted((row["suite"], row["score"]) for row in rows) == [
        *(("a", 0.0), ("a", 0.125), ("a", 0.75), ("a", 0.875)),
        *(("b", 0.25), ("b", 0.375)),
    ]
    table = (tmp_path / "quality_a.md").read_text()
    assert "| t | 8 | 0.1 | 0.062 (0.000 to 0.125) | 0.812 (0.750 to 0.875) |" in table


def test_starts_are_told_by_what_they_are_not_by_what_was_met_before(monkeypatch):
    """A Hopper kernel's number in what it is lowered to counts the kernels before it."""
    monkeypatch.setattr(mosaic_gpu, "check_device", lambda *arguments: None)
    knobs = {"model.implementation": "mosaic_gpu"}

    def name(method):
        cell = quality_cell.Cell("needles", method, 0)
        run = cell.run(None, knobs=knobs)
        return quality_cell.start_name(cell, run, meshes.make_mesh(run.mesh))

    assert name("bookmark") == name("mean_key") == name("bookmark")
