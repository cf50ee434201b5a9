"""Times block-sparse attention against cuDNN's dense causal attention on one GPU.

    python experiments/bench_kernels.py --lengths 32768,131072 --implementations cudnn,mosaic_gpu

Needs JAX and NumPy alone. Writes experiments/results/kernels_h100.json: one flat record for
each case, pass, implementation and length. Milliseconds are medians; TFLOP/s count the pairs
of queries and keys in listed blocks (dense: below the diagonal), 4*K FLOP a pair and query
head forward and 2.5 times that backward. The error, of out or of dq, is against the
float32 oracle on a few query blocks of one group, relative to the largest entry there.
Not run yet.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pallas_kernels import BlockSelection, block_sparse_attention

RESULT = ROOT / "experiments" / "results" / "kernels_h100.json"
BACKWARD = 2.5
"""FLOPs of a backward pass over those of a forward pass: five matmuls for two."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads and blocks of one call; `read_len` tokens are listed for a query block.

    Attributes:
        masked: with a token mask, in which each token chose half of its block's list.
    """

    name: str
    H: int = 16
    G: int = 4
    K: int = 128
    query_block: int = 128
    key_block: int = 128
    read_len: int = 2560
    masked: bool = False


CASES = (
    Case("128x128"),
    Case("128x128_32_heads", H=32, G=8),
    Case("128x16", key_block=16),
    Case("32x16", query_block=32, key_block=16),
    Case("32x16_masked", query_block=32, key_block=16, masked=True),
    Case("16x16_masked", query_block=16, key_block=16, read_len=1296, masked=True),
)


def make_arrays(case, length):
    """Random q, k, v and a cotangent of out, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, length, x, case.K) for x in (case.H, case.G, case.G, case.H)]
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)
    ]


def make_selection(case, length):
    """Causal lists: the block of token 0, the newest blocks, and random ones between.

    A quarter of a list is local. An early query block lists all that is before it.
    """
    rng = np.random.default_rng(0)
    Q, J = length // case.query_block, case.read_len // case.key_block
    block_id = np.full((1, case.G, Q, J), -1, np.int32)
    count = np.zeros((1, case.G, Q), np.int32)
    for i in range(Q):
        newest = ((i + 1) * case.query_block - 1) // case.key_block
        for g in range(case.G):
            if newest < J:
                chosen = np.arange(newest + 1)
            else:
                local = np.arange(newest - J // 4 + 1, newest + 1)
                # Drawn with repetitions and topped up: quick, and nearly uniform.
                some = np.unique(rng.integers(1, local[0], 2 * J))
                some = rng.permutation(some)[: J - 1 - len(local)]
                chosen = np.concatenate([[0], np.sort(some), local])
            block_id[0, g, i, : len(chosen)] = chosen
            count[0, g, i] = len(chosen)
    mask = None
    if case.masked:
        bits = rng.integers(0, 2**case.query_block, block_id.shape, dtype=np.uint64)
        mask = jnp.asarray(bits.astype(np.uint32))
    return BlockSelection(
        jnp.asarray(block_id),
        jnp.asarray(count),
        mask,
        case.query_block,
        case.key_block,
    )


def attend(case, implementation, q_BTHK, k_BSGK, v_BSGK, selection):
    """One forward pass; "cudnn" is dense and causal, and ignores the lists."""
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation="cudnn"
        )
    return block_sparse_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        selection,
        scale=case.K**-0.5,
        implementation=implementation,
    )[0]


def make_passes(case, implementation):
    """Jitted functions of (arrays, selection): {"forward": out, "forward+backward": grads}."""

    def forward(arrays, selection):
        return attend(case, implementation, *arrays[:3], selection)

    def both(arrays, selection):
        *inputs, cotangent = arrays
        _, pull = jax.vjp(
            lambda *inputs: attend(case, implementation, *inputs, selection), *inputs
        )
        return pull(cotangent)

    return {"forward": jax.jit(forward), "forward+backward": jax.jit(both)}


def measure(function, arguments, repeats):
    """Median wall time of a call that has compiled, in milliseconds, and its last result."""
    for _ in range(3):
        result = jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), result


def count_flops(case, implementation, length, selection):
    """FLOPs of a forward pass."""
    pairs = case.G * length * (length + 1) / 2
    if implementation != "cudnn":
        listed = np.asarray(selection.count_BGQ, np.int64).sum()
        pairs = float(listed) * case.query_block * case.key_block
    return 4 * case.K * (case.H // case.G) * pairs


def find_error(case, arrays, selection, of_pass, result):
    """Largest error on the rows of a few query blocks of the last group."""
    group, heads = case.G - 1, case.H // case.G
    Q = selection.count_BGQ.shape[-1]
    values = result if of_pass == "forward" else result[0]
    k_BSGK, v_BSGK = (x[:, :, group:].astype(jnp.float32) for x in arrays[1:3])
    errors = []
    for i in sorted({0, 1, Q // 3, Q // 2, Q - 1}):
        rows = slice(i * case.query_block, (i + 1) * case.query_block)
        q_BTHK, cotangent = (
            x[:, rows, group * heads :].astype(jnp.float32) for x in arrays[::3]
        )
        some = jax.tree.map(lambda x, i=i: x[:, group:, i : i + 1], selection)

        def oracle(q_BTHK, some=some, first=rows.start):
            return block_sparse_attention(
                q_BTHK,
                k_BSGK,
                v_BSGK,
                some,
                scale=case.K**-0.5,
                query_offset=first,
                implementation="reference",
            )[0]

        expected, pull = jax.vjp(oracle, q_BTHK)
        if of_pass != "forward":
            (expected,) = pull(cotangent)
        actual = values[:, rows, group * heads :].astype(jnp.float32)
        errors.append(jnp.abs(actual - expected).max() / jnp.abs(expected).max())
    return float(max(errors))


def bench(case, length, implementations, repeats):
    """Records of one case and length; what an implementation refuses stands as its error."""
    arrays, selection = make_arrays(case, length), make_selection(case, length)
    for implementation in implementations:
        for of_pass, function in make_passes(case, implementation).items():
            record = {
                "case": case.name,
                "pass": of_pass,
                "implementation": implementation,
                "length": length,
            }
            try:
                ms, result = measure(function, (arrays, selection), repeats)
            except RuntimeError as error:  # refused, out of memory, or no cuDNN
                yield record | {"failed": str(error).splitlines()[0][:200]}
                continue
            flops = count_flops(case, implementation, length, selection)
            flops *= 1 if of_pass == "forward" else 1 + BACKWARD
            error = None
            if implementation != "cudnn":
                error = find_error(case, arrays, selection, of_pass, result)
            yield record | {"ms": ms, "tflops": flops / ms / 1e9, "error": error}


def describe_run():
    """What a reader needs to repeat the run."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--implementations", default="cudnn,mosaic_gpu,xla")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    records = []
    for length in map(int, arguments.lengths.split(",")):
        for case in CASES:
            if case.name not in arguments.cases.split(","):
                continue
            implementations = arguments.implementations.split(",")
            for record in bench(case, length, implementations, arguments.repeats):
                print(json.dumps(record), flush=True)
                records.append(record)
                # After each record, so that a run that is cut off leaves what it has.
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(describe_run() | {"records": records}, indent=1)
                arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
