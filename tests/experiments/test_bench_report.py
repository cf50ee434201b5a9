"""Runs are joined, and only what was measured is stated."""

from experiments import bench_end_to_end, bench_kernels, bench_report

ORIGIN = {"command": "bench", "commit": "0123456789abcdef", "date": "d1", "device": "x"}


def _time(implementation, ms=None, **more):
    row = {"part": "time", "case": "128x16", "length": 1024, "pass": "forward"}
    figures = {"failed": "no"} if ms is None else {"ms": ms, "tflops": 100 / ms}
    return row | {"implementation": implementation} | figures | more


def _result(*records, **origin):
    return ORIGIN | origin | {"records": list(records)}


def test_the_latest_success_stands():
    flex = {"part": "time", "case": "128x16", "length": 1024, "implementation": "flex"}
    origin, rows = bench_report.join(
        [
            _result(_time("mosaic_gpu", 2.0), _time("cudnn"), flex | {"failed": "no"}),
            _result(_time("mosaic_gpu", 1.0), _time("flex", 3.0), date="d2"),
            _result(_time("mosaic_gpu"), _time("cudnn"), date="d3"),
        ]
    )
    found = {row["implementation"]: row for row in rows}
    assert len(rows) == 3 and origin["date"] == "d3"
    assert (found["mosaic_gpu"]["ms"], found["mosaic_gpu"]["date"]) == (1.0, "d2")
    assert "failed" in found["cudnn"] and found["flex"]["ms"] == 3.0


def test_tables_and_figure_hold_what_was_measured(tmp_path):
    layer = {"part": "end_to_end", "length": 1024, "ms": 4.0}
    rows = [
        _time("mosaic_gpu", 1.0, of_cudnn=0.9),
        _time("flex", 3.0, ours_over_this=3.0),
        layer | {"pass": "forward", "implementation": "cudnn"},
        layer | {"pass": "forward", "route": "flat", "times_dense": 2.0},
        layer | {"pass": "route", "route": "flat"},
        {"part": "decode", "batch": 1, "length": 1024, "failed": "no"},
    ]
    origin, rows = bench_report.join([_result(*rows)])
    text = bench_report.tables(origin | {"records": rows})
    assert "| 128x16 | 1,024 | x | 100 (0.90) | 3.0x |  |  |" in text
    assert "| 1,024 | flat | x | 4.0 (2.0x) |  |  | 4.0 |  |  |" in text
    assert "sequences" not in text and "fla's" not in text and "0123456789ab" in text
    assert bench_report.tables({"records": []}) == ""
    bench_report.draw(rows, "x", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def _nsa(implementation, ms, **more):
    row = {"part": "nsa", "case": "nsa_pool36", "length": 1024, "pool": 36}
    row |= {"pass": "forward", "implementation": implementation, "ms": ms}
    return row | more


def test_each_query_block_is_set_beside_the_one_peer_of_its_run():
    before = _nsa("mosaic_gpu", 3.0, union_blocks=30.0), _nsa("fla_nsa", 8.0)
    after = [
        _nsa("mosaic_gpu", ms, union_blocks=20.0, query_block=block)
        for block, ms in ((4, 2.0), (16, 4.0))
    ]

    def tabulate(*runs):
        origin, rows = bench_report.join(runs)
        return bench_report.tables(origin | {"records": rows}).splitlines()[2:4]

    first, second = _result(*before), _result(*after, before[1], date="d2")
    assert tabulate(first)[0] == "| 1,024 | 16 | 30 | x | 3.0 | 8.0 (2.67x) |  |  |"
    assert tabulate(first, second) == [
        "| 1,024 | 16 | 20 | x | 4.0 | 8.0 (2.00x) |  |  |",
        "| 1,024 | 4 | 20 | x | 2.0 | 8.0 (4.00x) |  |  |",
    ]
    alone = tabulate(first, _result(*after, date="d2"))
    assert alone[0] == "| 1,024 | 16 | 20 | x | 4.0 |  |  |  |"


def test_layers_that_are_timed_have_few_coarsest_chapters():
    assert {"time", "end_to_end"} <= set(bench_kernels.PARTS)
    for length in (2**15, 2**20, 10 * 2**20):
        index = bench_end_to_end.settings_for("chapters", length)
        size = index.C * index.chapter_bookmarks**index.chapter_levels
        assert length // size * index.chapter_R <= bench_end_to_end.COARSEST_POINTS
