"""Bytes and time of one layer's forward and backward at a million tokens, for `bench_kernels`."""

import math
import types

import jax

from experiments import bench_cases, bench_timing
from pallas_kernels import mosaic_gpu_plan, mosaic_gpu_readers, tiles


def count_reader_bytes(case, selection, length):
    """Bytes of the transposed lists of the pass for dK and dV."""
    sizes = tiles.hopper_dkv(case.K)
    parts = -(-case.H // case.G * case.query_block // mosaic_gpu_plan.PART)
    plan = types.SimpleNamespace(blocks=sizes.keys // case.key_block, has_bias=False)
    readers = jax.eval_shape(
        lambda: mosaic_gpu_readers.collect(
            plan,
            selection.block_id_BGQJ,
            selection.count_BGQ,
            None,
            length // sizes.keys,
            max(1, sizes.piece_steps // parts),
        )
    )
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(readers))


def measure(case, length, flags):
    """One layer's forward and backward at `length` tokens: time and bytes."""
    selection = jax.jit(lambda: bench_cases.make_selection(case, length))()
    function = bench_timing.compile_pass(
        case, length, flags.implementation, bench_timing.PASSES[1], selection
    )
    memory = function.memory_analysis()
    Q, blocks = length // case.query_block, length // case.key_block
    record = {
        "part": "capacity",
        "case": case.name,
        "length": length,
        "implementation": flags.implementation,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "list_bytes": sum(x.nbytes for x in jax.tree.leaves(selection)),
        "transposed_bytes": count_reader_bytes(case, selection, length),
        # Ids of key blocks a query block, and of query blocks a key block; each full or not.
        "flex_table_bytes": 4 * 4 * case.H * Q * blocks,
    }
    yield record
    arguments = bench_cases.make_arrays(case, length), selection
    ms, repeats, _ = bench_timing.measure(function, arguments, 3, flags.seconds)
    # The highest of the process so far: run this part alone.
    stats = jax.devices()[0].memory_stats() or {}
    peak_bytes = stats.get("peak_bytes_in_use")
    record |= {"ms": ms, "repeats": repeats, "peak_bytes": peak_bytes}
    yield record
