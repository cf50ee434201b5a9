"""One call of `bench_kernels`: compiled, timed, and compared with float32."""

import statistics
import time

import jax
import jax.numpy as jnp

from experiments import bench_cases
from pallas_kernels import block_sparse_attention

PASSES = ("forward", "forward+backward")
BACKWARD = 2.5
"""FLOPs of a backward pass over those of a forward pass: five matmuls for two."""
WORK = {"forward": 1, "forward+backward": 1 + BACKWARD}
"""FLOPs of a pass over those of a forward pass."""
GRADIENTS = ("out", "dq", "dk", "dv")


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


def compile_pass(case, length, implementation, of_pass, selection, dtype=jnp.bfloat16):
    """A compiled function of (arrays, selection): out, or out and the gradients."""

    def forward(arrays, selection):
        return (attend(case, implementation, *arrays[:3], selection),)

    def both(arrays, selection):
        *inputs, cotangent = arrays
        out, pull = jax.vjp(
            lambda *inputs: attend(case, implementation, *inputs, selection), *inputs
        )
        return out, *pull(cotangent)

    function = forward if of_pass == "forward" else both
    shapes = bench_cases.shapes(case, length)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    precision = "highest" if dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return jax.jit(function).lower(arrays, selection).compile()


def measure(function, arguments, repeats, seconds):
    """Median wall time in milliseconds, how many were taken, and the last result.

    At least one call is timed, and no more are begun after `seconds`.
    """
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    times = [time.perf_counter() - start]
    if times[0] < seconds / 4:
        jax.block_until_ready(function(*arguments))
        times = []
    while len(times) < repeats and sum(times) < seconds:
        del result
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), len(times), result


def find_errors(oracle, arrays, selection, result):
    """Largest error of out and, if there are any, of the gradients."""

    @jax.jit
    def compare(actual, expected):
        return [
            jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()
            for x, y in zip(actual, expected)
        ]

    arrays = [x.astype(jnp.float32) for x in arrays]
    errors = compare(result, oracle(arrays, selection)[: len(result)])
    return {f"error_{name}": float(x) for name, x in zip(GRADIENTS, errors)}


def measure_torch(run, repeats, seconds):
    """The same of a function without arguments that starts work of torch's; its first call compiles and tunes."""
    import torch

    result = run()
    torch.cuda.synchronize()
    times = []
    while not times or (len(times) < repeats and sum(times) < seconds):
        del result
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), len(times), result


def describe_failure(error):
    """An error as part of a record."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return {"failed": f"{type(error).__name__}: {line}"}
