"""Key tiles of a Mosaic GPU kernel: gathered by a producer warpgroup into shared memory.

A producer reads its team's list and copies key tiles of several key blocks, one bulk copy a
block, into a ring of stages, as fast as the consumers release them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_plan

PART = mosaic_gpu_plan.PART
COPY_IDS = 256
"""Most elements of one axis in a bulk copy."""


class Shared(NamedTuple):
    """Shared memory; the first axis counts consumers, teams, or teams x stages.

    The last three are those of the pass for dQ.
    """

    q: Any
    k: Any
    v: Any
    lse: Any
    block_id: Any
    token_mask: Any
    bias: Any
    segment_query: Any
    segment_key: Any
    d_out: Any = None
    delta: Any = None
    dbias: Any = None


class Barriers(NamedTuple):
    """One each: a consumer, a team x stage (k, v and their release), a team (list, turn)."""

    q: Any
    k: Any
    v: Any
    k_free: Any
    v_free: Any
    lists: Any
    turn: Any


def shared_types(plan, backward=False):
    """Shared memory of a thread block of the forward pass, or of the one for dQ."""
    tiles = plan.tiles
    ring = tiles.teams * tiles.stages
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matrix(count, rows):
        return plgpu.SMEM((count, rows, plan.K), plan.dtype, transforms=transforms)

    def ids(*shape):
        return plgpu.SMEM(shape, jnp.int32)

    def floats(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    return Shared(
        q=matrix(tiles.consumers, PART),
        k=matrix(ring, tiles.keys),
        v=matrix(ring, tiles.keys),
        lse=floats(tiles.consumers, PART),
        block_id=ids(tiles.teams, plan.J),
        token_mask=ids(tiles.teams, plan.J) if plan.has_mask else None,
        bias=floats(ring, plan.blocks, plan.token_parts * PART)
        if plan.has_bias
        else None,
        segment_query=ids(tiles.consumers, PART) if plan.has_segments else None,
        # A copy starts at a multiple of 128 bytes: short blocks leave gaps.
        segment_key=ids(ring, plan.blocks, max(plan.key_block, 32))
        if plan.has_segments
        else None,
        d_out=matrix(tiles.consumers, PART) if backward else None,
        delta=floats(tiles.consumers, PART) if backward else None,
        dbias=floats(tiles.consumers, plan.blocks, PART)
        if backward and plan.has_bias
        else None,
    )


def barrier_types(plan, backward=False):
    """Barriers of a thread block. One that gathers counts an arrival a copy."""
    tiles = plan.tiles
    ring = tiles.teams * tiles.stages
    extra = plan.blocks * plan.has_segments + plan.has_bias
    query_copies = plan.part_heads + plan.has_segments
    if backward:
        query_copies += plan.part_heads + 2
    list_copies = -(-plan.J // COPY_IDS) * (1 + plan.has_mask)
    barrier = plgpu.Barrier
    return Barriers(
        q=barrier(num_arrivals=query_copies, num_barriers=tiles.consumers),
        k=barrier(num_arrivals=plan.blocks + extra, num_barriers=ring),
        v=barrier(num_arrivals=plan.blocks, num_barriers=ring),
        k_free=barrier(num_arrivals=tiles.parts, num_barriers=ring),
        v_free=barrier(num_arrivals=tiles.parts, num_barriers=ring),
        lists=barrier(num_arrivals=list_copies, num_barriers=tiles.teams),
        turn=barrier(num_arrivals=tiles.parts, num_barriers=tiles.teams),
    )


def copy_queries(plan, inputs, place, part, arrays, barrier):
    """Copies a part's rows, and starts a count of arrivals that the caller may add to.

    Args:
        arrays: pairs of an array in device memory, BTHK, and a tile in shared memory.
    """
    i, _ = mosaic_gpu_plan.divide(place.i, plan.pieces)
    for rows, tokens, head, _ in mosaic_gpu_plan.head_slices(plan, i, part):
        for x_BTHK, tile in arrays:
            plgpu.copy_gmem_to_smem(
                x_BTHK.at[place.b, tokens, place.g * plan.heads + head],
                tile.at[rows],
                barrier,
            )


def produce(plan, inputs, shared, barriers, team):
    """Copies a team's list, then its key tiles as fast as the consumers release stages."""
    place = mosaic_gpu_plan.locate(plan, inputs, team)
    b, g, i, count, steps = place.b, place.g, place.i, place.count, place.steps
    lists = [(inputs.block_id_BGQJ, shared.block_id)]
    if plan.has_mask:
        lists.append((inputs.token_mask_BGQJ, shared.token_mask))
    for first in range(0, plan.J, COPY_IDS):
        some = pl.ds(first, min(COPY_IDS, plan.J - first))
        for gmem, smem in lists:
            plgpu.copy_gmem_to_smem(
                gmem.at[b, g, i, some], smem.at[team, some], barriers.lists.at[team]
            )
    plgpu.barrier_wait(barriers.lists.at[team])

    def gather(ids, gmem_BSGK, smem, barrier):
        C = plan.key_block
        for p, block_id in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                gmem_BSGK.at[b, pl.ds(block_id * C, C), g],
                smem.at[pl.ds(p * C, C)],
                barrier,
            )

    @pl.loop(0, steps)
    def _load(step):
        entry = step * plan.blocks
        ids = [shared.block_id[team, entry + p] for p in range(plan.blocks)]
        # The last tile repeats a listed block, which the consumers mask.
        ids = [jnp.where(entry + p < count, x, ids[0]) for p, x in enumerate(ids)]
        slot = team * plan.tiles.stages + lax.rem(step, jnp.int32(plan.tiles.stages))
        again = step >= plan.tiles.stages
        pl.when(again)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
        gather(ids, inputs.k_BSGK, shared.k.at[slot], barriers.k.at[slot])
        if plan.has_segments:
            for p, block_id in enumerate(ids):
                plgpu.copy_gmem_to_smem(
                    inputs.segment_key_BS.at[
                        b, pl.ds(block_id * plan.key_block, plan.key_block)
                    ],
                    shared.segment_key.at[slot, p, pl.ds(0, plan.key_block)],
                    barriers.k.at[slot],
                )
        if plan.has_bias:
            plgpu.copy_gmem_to_smem(
                inputs.bias_rows.at[b, g, i, pl.ds(entry, plan.blocks)],
                shared.bias.at[slot],
                barriers.k.at[slot],
            )
        pl.when(again)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
        gather(ids, inputs.v_BSGK, shared.v.at[slot], barriers.v.at[slot])

    drain(plan, steps, [barriers.k_free, barriers.v_free], team * plan.tiles.stages)


def drain(plan, steps, barriers, first_slot=0):
    """Waits until the stages of a ring, filled for `steps` steps, are all released.

    A thread that waits for one phase of a barrier must wait for all of them.
    """
    for stage in range(plan.tiles.stages):

        @pl.when(stage < steps)
        def _wait(slot=first_slot + stage):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[slot])
