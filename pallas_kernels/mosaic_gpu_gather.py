"""Key tiles of a Mosaic GPU kernel: gathered by a producer warpgroup into shared memory.

A producer reads its team's list and copies key tiles of several key blocks, one bulk copy a
block, into a ring of stages, as fast as the consumers release them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_plan

PART = mosaic_gpu_plan.PART
COPY_IDS = 256
"""Most elements of one axis in a bulk copy."""


class Shared(NamedTuple):
    """Shared memory; the first axis counts consumers, teams, or teams x stages.

    There are `buffers` of `q`, `lists`, `token_mask` and `segment_query` for each consumer or
    team. The last three are those of the pass for dQ.
    """

    q: Any
    k: Any
    v: Any
    lse: Any
    lists: Any
    token_mask: Any
    bias: Any
    segment_query: Any
    segment_key: Any
    d_out: Any = None
    delta: Any = None
    dbias: Any = None


class Barriers(NamedTuple):
    """One each: a buffer (q, list and its release), a stage (k, v and theirs), a team (turn)."""

    q: Any
    k: Any
    v: Any
    k_free: Any
    v_free: Any
    lists: Any
    lists_free: Any
    turn: Any


def shared_types(plan, backward=False):
    """Shared memory of a thread block of the forward pass, or of the one for dQ."""
    tiles = plan.tiles
    ring = tiles.teams * tiles.stages
    list_buffers, row_buffers = (
        tiles.buffers * x for x in (tiles.teams, tiles.consumers)
    )
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matrix(count, rows):
        return plgpu.SMEM((count, rows, plan.K), plan.dtype, transforms=transforms)

    def ids(*shape):
        return plgpu.SMEM(shape, jnp.int32)

    def floats(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    return Shared(
        q=matrix(row_buffers, PART),
        k=matrix(ring, tiles.keys),
        v=matrix(ring, tiles.keys),
        lse=floats(tiles.consumers, PART),
        lists=ids(list_buffers, plan.J + mosaic_gpu_plan.HEAD),
        token_mask=ids(list_buffers, plan.J) if plan.has_mask else None,
        bias=floats(ring, plan.blocks, plan.tile_token_parts * PART)
        if plan.has_bias
        else None,
        segment_query=ids(row_buffers, PART) if plan.has_segments else None,
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
    query_copies = plan.part_slices + plan.has_segments
    if backward:
        query_copies += plan.part_slices + 2
    list_copies = len(_cut_list(plan.J + mosaic_gpu_plan.HEAD))
    list_copies += len(_cut_list(plan.J)) * plan.has_mask
    list_buffers = tiles.buffers * tiles.teams
    barrier = plgpu.Barrier
    return Barriers(
        q=barrier(
            num_arrivals=query_copies, num_barriers=tiles.buffers * tiles.consumers
        ),
        k=barrier(num_arrivals=plan.blocks + extra, num_barriers=ring),
        v=barrier(num_arrivals=plan.blocks, num_barriers=ring),
        k_free=barrier(num_arrivals=tiles.parts, num_barriers=ring),
        v_free=barrier(num_arrivals=tiles.parts, num_barriers=ring),
        lists=barrier(num_arrivals=list_copies, num_barriers=list_buffers),
        lists_free=barrier(num_arrivals=tiles.parts, num_barriers=list_buffers),
        turn=barrier(num_arrivals=tiles.parts, num_barriers=tiles.teams),
    )


def copy_queries(plan, inputs, place, part, arrays, barrier):
    """Copies a part's rows, and starts a count of arrivals that the caller may add to.

    Args:
        arrays: pairs of an array in device memory, BTHK, and a tile in shared memory.
    """
    for rows, source, _ in mosaic_gpu_plan.slice_part(plan, place[:3], part):
        for x_BTHK, tile in arrays:
            plgpu.copy_gmem_to_smem(x_BTHK.at[source], tile.at[rows], barrier)


def _cut_list(words):
    """What each bulk copy takes of a list."""
    firsts = range(0, words, COPY_IDS)
    return [pl.ds(first, min(COPY_IDS, words - first)) for first in firsts]


def produce(plan, inputs, shared, barriers, team):
    """Copies a team's lists, and their key tiles as fast as the consumers release stages."""
    stages, buffers = plan.tiles.stages, plan.tiles.buffers

    def copy_tile(lap, start):
        place = mosaic_gpu_plan.locate(plan, team, lap)
        index = mosaic_gpu_plan.rotate(lap, buffers, team)
        pl.when(lap >= buffers)(
            lambda: plgpu.barrier_wait(barriers.lists_free.at[index])
        )
        _copy_list(plan, inputs, shared, place, index, barriers.lists.at[index])
        plgpu.barrier_wait(barriers.lists.at[index])
        extent = mosaic_gpu_plan.measure(plan, shared.lists.at[index])

        @pl.loop(0, extent.steps)
        def _copy(step):
            entry = step * plan.blocks
            ids = [shared.lists[index, entry + p] for p in range(plan.blocks)]
            # The last tile repeats a listed block, which the consumers mask.
            ids = [
                jnp.where(entry + p < extent.count, x, ids[0])
                for p, x in enumerate(ids)
            ]
            _copy_keys(
                plan, inputs, shared, barriers, place, (team, start + step, entry), ids
            )

        return start + extent.steps

    steps = mosaic_gpu_plan.each_lap(plan, copy_tile, jnp.int32(0))
    drain(stages, steps, [barriers.k_free, barriers.v_free], team * stages)
    laps = mosaic_gpu_plan.count_laps(plan)
    drain(buffers, laps, [barriers.lists_free], team * buffers)


def _copy_list(plan, inputs, shared, place, index, barrier):
    """Starts the copies of a list and its token mask."""
    copies = [(inputs.lists, shared.lists)]
    if plan.has_mask:
        copies.append((inputs.token_mask_BGQJ, shared.token_mask))
    for gmem, smem in copies:
        for some in _cut_list(gmem.shape[-1]):
            plgpu.copy_gmem_to_smem(
                gmem.at[place.b, place.g, place.i, some], smem.at[index, some], barrier
            )


def _copy_keys(plan, inputs, shared, barriers, place, step, ids):
    """Copies a key tile as soon as its stage is free.

    Args:
        step: the team, how many key tiles it had before, and this one's entry in the list.
        ids: of the key blocks.
    """
    b, g, i, part = place
    team, number, entry = step
    C, stages = plan.key_block, plan.tiles.stages
    slot = mosaic_gpu_plan.rotate(number, stages, team)
    again = number >= stages

    def gather(gmem_BSGK, smem, barrier):
        for p, block_id in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                gmem_BSGK.at[b, pl.ds(block_id * C, C), g],
                smem.at[pl.ds(p * C, C)],
                barrier,
            )

    pl.when(again)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
    gather(inputs.k_BSGK, shared.k.at[slot], barriers.k.at[slot])
    if plan.has_segments:
        for p, block_id in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                inputs.segment_key_BS.at[b, pl.ds(block_id * C, C)],
                shared.segment_key.at[slot, p, pl.ds(0, C)],
                barriers.k.at[slot],
            )
    if plan.has_bias:
        _, token_part = mosaic_gpu_plan.divide(part, plan.token_parts)
        tokens = pl.ds(token_part * PART, plan.tile_token_parts * PART)
        plgpu.copy_gmem_to_smem(
            inputs.bias_rows.at[b, g, i, pl.ds(entry, plan.blocks), tokens],
            shared.bias.at[slot],
            barriers.k.at[slot],
        )
    pl.when(again)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
    gather(inputs.v_BSGK, shared.v.at[slot], barriers.v.at[slot])


def drain(slots, filled, barriers, first_slot=0):
    """Waits until the slots of a ring, filled one after another, are all released.

    A thread that waits for one phase of a barrier must wait for all of them.
    """
    for number in range(slots):

        @pl.when(number < filled)
        def _wait(slot=first_slot + number):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[slot])
