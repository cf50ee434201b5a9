"""Times tile sizes of the Hopper kernels, for `pallas_kernels/tiles.py`.

    python -m experiments.tune_kernels --length=32768 --cases=128x128,16x16_masked

One kernel's tiles change at a time, the others keep theirs. The forward kernel is timed by
a forward pass, the two backward ones by both passes. Writes experiments/results/tiles_h100.json
after each record; tiles that don't fit stand with their error. Not run on a card yet.
"""

import argparse
import dataclasses
import json
import pathlib
from unittest import mock

import jax

from experiments import bench_cases, bench_kernels, bench_timing
from pallas_kernels import mosaic_gpu_plan, tiles

RESULT = pathlib.Path(__file__).parent / "results" / "tiles_h100.json"
LISTS, KEYS = tiles.HopperListTiles, tiles.HopperKeyTiles
MANY_ROWS = (
    LISTS(1, 2, 128, 2, 232, 40, buffers=2),
    LISTS(1, 2, 128, 2, 232, 40),
    LISTS(1, 2, 64, 2, 232, 40),
    LISTS(1, 2, 64, 3, 232, 40),
    LISTS(1, 2, 64, 4, 232, 40),
)
FEW_ROWS = (
    LISTS(2, 1, 64, 2, 208, 40, buffers=2),
    LISTS(2, 1, 64, 2, 208, 40),
    LISTS(1, 1, 64, 2, 240, 40),
    LISTS(1, 1, 64, 4, 240, 40),
    LISTS(1, 1, 128, 2, 240, 40),
)
READERS = tuple(
    KEYS(128, stages, steps, 232, 40)
    for stages, steps in ((4, 256), (3, 256), (2, 256), (4, 64), (4, 128), (4, 1024))
)
"""For heads of at most 128; more than one part of 64 rows, one, and the pass for dK and dV."""


def candidates(case):
    """Pairs: a function of `tiles`, and tiles that it might give."""
    is_many = case.H // case.G * case.query_block > mosaic_gpu_plan.PART
    lists = MANY_ROWS if is_many else FEW_ROWS
    for name, some in (
        ("hopper_forward", lists),
        ("hopper_dq", [x for x in lists if x.buffers == 1]),
        ("hopper_dkv", READERS),
    ):
        for sizes in some:
            yield name, sizes


def time_tiles(case, length, name, sizes, arguments):
    """Milliseconds of a pass with these tiles, or why there are none."""
    of_pass = bench_timing.PASSES[name != "hopper_forward"]
    record = {"case": case.name, "length": length, "kernel": name, "pass": of_pass}
    record |= dataclasses.asdict(sizes)
    jax.clear_caches()  # A trace doesn't know that the tiles have changed.
    with mock.patch.object(tiles, name, lambda *_, **__: sizes):
        try:
            function = bench_timing.compile_pass(
                case, length, "mosaic_gpu", of_pass, arguments[1]
            )
            ms, repeats, _ = bench_timing.measure(function, arguments, 20, seconds=5)
        except (RuntimeError, ValueError) as error:
            return record | {"failed": str(error).splitlines()[0][:200]}
    return record | {"ms": ms, "repeats": repeats}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**15)
    parser.add_argument("--cases", default="128x128,16x16_masked")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    flags = parser.parse_args()
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for case in bench_cases.CASES:
        if case.name not in flags.cases.split(","):
            continue
        selection = bench_cases.make_selection(case, flags.length)
        arguments = bench_cases.make_arrays(case, flags.length), selection
        for name, sizes in candidates(case):
            records.append(time_tiles(case, flags.length, name, sizes, arguments))
            print(json.dumps(records[-1]), flush=True)
            text = json.dumps(
                bench_kernels.describe_run("tune_kernels") | {"records": records},
                indent=1,
            )
            flags.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
