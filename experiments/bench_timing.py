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
SAMPLE_SECONDS = 0.02
COMPARED_PARTS = 16


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
    """Median wall time of a call in milliseconds, how many samples were taken, and the last result.

    A sample is several calls in a row that take `SAMPLE_SECONDS` together, so that what the
    host needs to start one doesn't count. At least one is taken, and no more are begun after
    `seconds`.
    """
    return _measure(
        lambda: function(*arguments), jax.block_until_ready, repeats, seconds
    )


def _measure(run, wait, repeats, seconds):
    """`measure`, of work that `run` starts and `wait` waits for. The first call may compile."""
    wait(run())
    times, calls = [_time_calls(run, wait, 1)], 1
    if times[0] < seconds / 4:
        calls = max(1, round(SAMPLE_SECONDS / times.pop()))
    while len(times) < repeats and calls * sum(times) < seconds:
        times.append(_time_calls(run, wait, calls))
    return 1e3 * statistics.median(times), len(times), run()


def _time_calls(run, wait, calls):
    """Seconds of a call, mean of several."""
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    wait(result)
    return (time.perf_counter() - start) / calls


def find_errors(oracle, arrays, selection, result):
    """Largest error of out and, if there are any, of the gradients."""

    def largest(xy):
        x, y = xy
        return jnp.abs(x.astype(jnp.float32) - y).max(), jnp.abs(y).max()

    @jax.jit
    def compare(x, y):
        # Part by part: arrays of a million tokens leave no room for their difference.
        parts = (x.reshape(COMPARED_PARTS, -1), y.reshape(COMPARED_PARTS, -1))
        error, size = jax.lax.map(largest, parts)
        return error.max() / size.max()

    arrays = [x.astype(jnp.float32) for x in arrays]
    expected = oracle(arrays, selection)
    del arrays
    errors = [compare(x, y) for x, y in zip(result, expected)]
    return {f"error_{name}": float(x) for name, x in zip(GRADIENTS, errors)}


def measure_torch(run, repeats, seconds):
    """`measure`, of a function without arguments that starts work of torch's."""
    import torch

    return _measure(run, lambda _: torch.cuda.synchronize(), repeats, seconds)


def describe_failure(error):
    """An error as part of a record."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return {"failed": f"{type(error).__name__}: {line}"}
