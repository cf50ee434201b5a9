"""Consumers of `mosaic_gpu_dkv` for key blocks of 16 or 32: a block across, head width down.

A product of the tensor cores has 64 rows, but may have 16 columns. With keys down, 64 of
them are multiplied for one block that is listed. Here rows of queries are down for the
weights, and head width for dK and dV: the work is in proportion to the blocks listed. The
weights get to the second products by way of shared memory.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    mosaic_gpu_logits,
    mosaic_gpu_matmul,
    mosaic_gpu_plan,
)

PART = mosaic_gpu_plan.PART
CONSUMERS = 2


class Factors(NamedTuple):
    """Shared memory of the products of a part of queries and a key block.

    `weights`, [2 C, 64], is for the gradients of the logits, and under them the weights.
    """

    q: Any
    d_out: Any
    lse: Any
    delta: Any
    k: Any
    v: Any
    weights: Any


def consume(plan, inputs, place, table_FE, out_refs, shared, barriers, warpgroup):
    """Adds up what the rows of a piece say of a consumer's blocks, and stores it."""
    num_blocks = plan.blocks // CONSUMERS
    first_block = warpgroup * num_blocks
    plgpu.barrier_wait(barriers.keys)

    def read_entry(entry):
        """The query block of an entry of the piece, and a word for each block."""
        fields = [0, *(1 + first_block + p for p in range(num_blocks))]
        return [table_FE[field, place.first + entry] for field in fields]

    def add_rows(step, part, entry, carry):
        (i, *words), sums = carry
        slot = lax.rem(step, jnp.int32(plan.tiles.stages))
        # The next step's, so that nobody waits for it.
        following = read_entry(jnp.where(entry + 1 < place.entries, entry + 1, 0))
        plgpu.barrier_wait(barriers.rows.at[slot])

        def add(p, sums):
            segment_ref = shared.segment_query.at[slot] if plan.has_segments else None
            rows = mosaic_gpu_logits.describe_rows(
                plan, inputs, place, i, part, segment_ref
            )
            # Hidden, or addresses of all blocks are made before the loop, and spilled.
            section = lax.optimization_barrier(warpgroup)
            keys = pl.ds(p * plan.key_block, plan.key_block)
            position = place.tile * plan.tiles.keys
            block = mosaic_gpu_logits.Block(
                position + (first_block + p) * plan.key_block,
                words[p] if plan.has_mask else None,
                shared.segment_key.at[section, keys] if plan.has_segments else None,
                shared.bias.at[slot, first_block + p] if plan.has_bias else None,
            )
            factors = Factors(
                *(x.at[slot] for x in (shared.q, shared.d_out)),
                *(x.at[slot] for x in (shared.lse, shared.delta)),
                *(x.at[section, keys] for x in (shared.k, shared.v)),
                shared.weights.at[section],
            )
            return _add_block(plan, inputs, place.b, rows, block, factors, sums)

        # None or one round for each: a tile's reader needn't read all of its blocks.
        sums = [
            lax.fori_loop(0, jnp.where(word != 0, 1, 0), lambda _, x, p=p: add(p, x), x)
            for p, (word, x) in enumerate(zip(words, sums))
        ]
        plgpu.barrier_arrive(barriers.free.at[slot])
        return following, sums

    @pl.when(place.entries > 0)
    def _accumulate():
        zeros = mosaic_gpu_matmul.zeros(
            plan.K, plan.key_block, layout=plgpu.Layout.WGMMA
        )
        carry = read_entry(jnp.int32(0)), [[zeros] * 2] * num_blocks
        _, sums = mosaic_gpu_plan.each_step(plan, place.entries, add_rows, carry)
        for p, of_block in enumerate(sums):
            for out_ref, x in zip(out_refs, of_block):
                out_ref.at[first_block + p][...] = x


def _add_block(plan, inputs, b, rows, block, factors, sums):
    """Adds what a part of queries says of a key block.

    Args:
        b: batch.
        sums: dK without the scale, and dV: [K, C].
    """
    s, dp = mosaic_gpu_matmul.multiply(
        (factors.q, factors.k.transpose((1, 0))),
        (factors.d_out, factors.v.transpose((1, 0))),
    )
    logits, slope = mosaic_gpu_logits.weigh_block(
        plan, inputs, b, rows, block, s, with_slope=True
    )

    def spread(ref):
        x = plgpu.load(ref, layout=mosaic_gpu_logits.ROW)
        return lax.broadcast_in_dim(x, (PART, plan.key_block), [0])

    p = jnp.exp2(logits * plan.to_bits - spread(factors.lse))
    ds = p * (dp - spread(factors.delta))
    ds = ds if slope is None else ds * slope
    both = jnp.concatenate([x.astype(plan.dtype) for x in (ds, p)], axis=1)
    both = plgpu.layout_cast(both, plgpu.Layout.WGMMA_TRANSPOSED)
    factors.weights.transpose((1, 0))[...] = both
    # Orders, too, what was read of the stage before the copy that comes next.
    plgpu.commit_smem()
    halves = [
        factors.weights.at[pl.ds(first, plan.key_block)].transpose((1, 0))
        for first in (0, plan.key_block)
    ]
    columns = [x.transpose((1, 0)) for x in (factors.q, factors.d_out)]
    return mosaic_gpu_matmul.multiply_add_shared(plan, sums, list(zip(columns, halves)))
