"""Times block-sparse attention against dense and other sparse attention on one GPU.

    python -m experiments.bench_kernels                        # everything
    python -m experiments.bench_kernels --parts=time --lengths=32768 --cases=128x128
    python -m experiments.bench_kernels --parts=parity,capacity --implementation=mosaic_gpu
    python -m experiments.bench_kernels --parts=time --implementation=triton --peers=cudnn,mosaic_gpu
    python -m experiments.bench_kernels --parts=nsa --lengths=32768 --pools=36,208 --seconds=2

Parts: `time` (forward, and forward with backward), `capacity` (one layer's forward and
backward at a million tokens), `decode` (one token, caches as long), `parity` (random calls
against the oracle, and twice for the same bits), `nsa` (tokens that choose, up to 128K of
them, against flash-linear-attention), `end_to_end` (a layer from keys to output, by each of
`--routes`, against dense). Peers of `time`: cuDNN's dense causal attention, FlexAttention if
there is torch, and any other implementation. What fails is a record, too.

Needs JAX, NumPy and absl alone. Writes experiments/results/kernels_h100.json after each
record: flat ones. Milliseconds are medians; TFLOP/s count the pairs of queries and keys in listed blocks
(dense: below the diagonal), 4*K FLOP a pair and query head forward and 2.5 times that
backward. Errors, of all entries and relative to the largest, are against `xla` in float32,
which the parity suite holds to the oracle. `bench_report` joins the files of several runs.
"""

import argparse
import datetime
import faulthandler
import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent import futures

# Torch needs a part of the card's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from experiments import (
    bench_capacity,
    bench_cases,
    bench_decode,
    bench_end_to_end,
    bench_flex,
    bench_nsa,
    bench_parity,
    bench_timing,
)
from pallas_kernels import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULT = ROOT / "experiments" / "results" / "kernels_h100.json"
PARTS = ["parity", "capacity", "decode", "nsa", "end_to_end", "time"]
DENSE_HEADS_LENGTH = 2**18
"""Longest text for which dense attention is timed with other heads than the first case's."""


def time_case(case, length, flags, dense):
    """Records of one case and length; what a peer refuses stands as its error.

    Args:
        dense: {(pass, heads, length): TFLOP/s of cuDNN}, which this adds to.
    """
    arrays = bench_cases.make_arrays(case, length)
    selection = jax.jit(lambda: bench_cases.make_selection(case, length))()
    pairs = bench_cases.count_pairs(case, length, selection)
    heads = case.H if length <= DENSE_HEADS_LENGTH else bench_cases.CASES[0].H
    names = [flags.implementation, *(x for x in flags.peers if x in IMPLEMENTATIONS)]
    passes = [x for x in bench_timing.PASSES if x in flags.passes]
    rows = [(name, of_pass) for name in names for of_pass in passes]
    if "cudnn" in flags.peers:
        missing = [p for p in flags.passes if (p, heads, length) not in dense]
        rows = [("cudnn", p) for p in missing if heads == case.H] + rows
    base = {"part": "time", "case": case.name, "length": length}
    with futures.ThreadPoolExecutor() as pool:
        compiled = [
            pool.submit(bench_timing.compile_pass, case, length, *row, selection)
            for row in rows
        ]
        oracle = None
        if flags.errors == "xla":
            oracle = pool.submit(
                bench_timing.compile_pass,
                case,
                length,
                "xla",
                passes[-1],
                selection,
                jnp.float32,
            )
        futures.wait(compiled)  # A machine that compiles is a poor clock.
    rates = {}
    for (implementation, of_pass), function in zip(rows, compiled):
        record = base | {"pass": of_pass, "implementation": implementation}
        is_dense = implementation == "cudnn"
        try:
            ms, repeats, result = bench_timing.measure(
                function.result(), (arrays, selection), flags.repeats, flags.seconds
            )
            rate = 4 * case.K * bench_timing.WORK[of_pass] / ms / 1e9
            rate *= bench_cases.count_pairs(case, length) if is_dense else pairs
            record |= {"ms": ms, "repeats": repeats, "tflops": rate}
            if is_dense:
                dense[of_pass, heads, length] = rate
            else:
                if implementation != flags.implementation and of_pass in rates:
                    record["ours_over_this"] = rates[of_pass] / rate
                rates.setdefault(of_pass, rate)
                if (of_pass, heads, length) in dense:
                    record["of_cudnn"] = rate / dense[of_pass, heads, length]
                yield record
                if oracle:
                    record |= bench_timing.find_errors(
                        oracle.result(), arrays, selection, result
                    )
            del result
        except Exception as error:  # noqa: BLE001 refused, out of memory, no cuDNN
            record |= bench_timing.describe_failure(error)
        yield record
    if "flex" in flags.peers and case.query_block == case.key_block:
        yield from _time_flex(case, length, flags, arrays, selection, pairs, rates)


def _time_flex(case, length, flags, arrays, selection, pairs, rates):
    """Records of FlexAttention on the same arrays and lists."""
    base = {"part": "time", "case": case.name, "length": length}
    base |= {"implementation": "flex"}
    try:
        found = bench_flex.measure(
            case, arrays, selection, flags.repeats, flags.seconds
        )
    except Exception as error:  # noqa: BLE001 torch and its compiler raise what they like
        yield base | bench_timing.describe_failure(error)
        return
    for of_pass, (ms, repeats) in found.items():
        rate = 4 * case.K * bench_timing.WORK[of_pass] * pairs / ms / 1e9
        record = base | {"pass": of_pass, "ms": ms, "repeats": repeats, "tflops": rate}
        if of_pass in rates:
            record["ours_over_this"] = rates[of_pass] / rate
        yield record


def list_work(flags):
    """(part, what its records have in common, generator of them), one after another."""
    cases = [x for x in bench_cases.CASES if x.name in flags.cases]
    if "parity" in flags.parts:
        yield "parity", {}, bench_parity.check(flags.implementation, flags.draws)
    if "capacity" in flags.parts:
        for case in (cases[0], cases[-1]):
            base = {"case": case.name, "length": flags.capacity}
            yield "capacity", base, bench_capacity.measure(case, flags.capacity, flags)
    if "decode" in flags.parts:
        for batch in (1, 8):
            yield (
                "decode",
                {"batch": batch},
                bench_decode.measure(batch, flags.capacity),
            )
    if "nsa" in flags.parts:
        for length in [x for x in flags.lengths if x <= bench_nsa.LONGEST]:
            for pool in flags.pools:
                base = {"length": length, "pool": pool}
                yield "nsa", base, bench_nsa.measure(length, pool, flags)
    if "end_to_end" in flags.parts:
        dense = {}
        for length in flags.lengths:
            base = {"length": length}
            records = bench_end_to_end.measure_dense(length, flags, dense)
            yield "end_to_end", base | {"implementation": "cudnn"}, records
            for name in flags.routes:
                records = bench_end_to_end.measure(length, name, flags, dense)
                yield "end_to_end", base | {"route": name}, records
    if "time" in flags.parts:
        dense = {}
        for length in flags.lengths:
            for case in cases:
                base = {"case": case.name, "length": length}
                yield "time", base, time_case(case, length, flags, dense)


def run(flags):
    """Records of all parts that were asked for. What fails is a record, and the rest goes on."""
    end = time.monotonic() + flags.budget
    for part, base, records in list_work(flags):
        if time.monotonic() > end:
            return
        try:
            yield from records
        except Exception as error:  # noqa: BLE001
            yield {"part": part} | base | bench_timing.describe_failure(error)


def describe_run(experiment):
    """What a reader needs to repeat the run of a file of this folder."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    return {
        "command": " ".join([f"python -m experiments.{experiment}", *sys.argv[1:]]),
        "commit": git.stdout.strip() or os.environ.get("BSA_COMMIT", "unknown"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }


def parse_flags():
    def words(text):
        return text.split(",")

    def numbers(text):
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=words, default=PARTS)
    parser.add_argument("--implementation", default="mosaic_gpu")
    parser.add_argument("--peers", type=words, default=["cudnn", "flex"])
    parser.add_argument("--passes", type=words, default=list(bench_timing.PASSES))
    parser.add_argument("--lengths", type=numbers, default=[2**15, 2**17, 2**20])
    names = [case.name for case in bench_cases.CASES]
    parser.add_argument("--cases", type=words, default=names)
    parser.add_argument(
        "--pools", type=numbers, default=list(bench_nsa.POOLS), help="of `nsa`"
    )
    routes = ["chapters", "flat", "chapters:xla", "flat:xla", "graph"]
    parser.add_argument("--routes", type=words, default=routes)
    parser.add_argument("--errors", choices=["xla", "none"], default="xla")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=15, help="of a row, at most")
    parser.add_argument(
        "--budget",
        type=float,
        default=3600,
        help="seconds after which nothing is begun; a minute later the process ends",
    )
    parser.add_argument("--draws", type=int, default=20, help="of each random setting")
    parser.add_argument(
        "--capacity", type=int, default=2**20, help="tokens of `capacity` and `decode`"
    )
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    return parser.parse_args()


def main():
    flags, records = parse_flags(), []
    faulthandler.dump_traceback_later(flags.budget + 60, exit=True)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    for record in run(flags):
        if not records or records[-1] is not record:  # Else one that has grown.
            records.append(record)
        print(json.dumps(record), flush=True)
        text = json.dumps(
            describe_run("bench_kernels") | {"records": records}, indent=1
        )
        flags.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
