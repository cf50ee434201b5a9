"""Forward pass for Hopper GPUs in Pallas Mosaic GPU, called by `mosaic_gpu`.

A thread block works on one or two tiles of query rows (see `mosaic_gpu_plan`). For each, a
producer warpgroup gathers key tiles (see `mosaic_gpu_gather`); consumer warpgroups multiply
on the tensor cores and keep an online softmax in float32 registers. Two consumers of one
tile take turns: while one computes exponentials, the other has the tensor cores.

The first thread blocks stay on their multiprocessors and go from tile to tile, so that the
next list, keys and queries arrive while this tile is finished and its output leaves.

After JAX's `attention_mgpu.py` and FlashAttention-3 (arXiv 2407.08608).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    mosaic_gpu_gather,
    mosaic_gpu_logits,
    mosaic_gpu_matmul,
    mosaic_gpu_plan,
)

PART = mosaic_gpu_plan.PART
LOWEST = -1e30
"""Running maximum of a row that has met no key: finite, so that no inf is subtracted."""


def run(plan, operands, interpret):
    """Attends.

    Returns:
        out_BTHK, and the lse of rows as [B, G, Q, list_parts * 64], natural log.
    """
    arrays, tree = jax.tree.flatten(operands)

    def attend_forward(*refs):
        inputs = tree.unflatten(refs[: len(arrays)])
        *out_refs, shared, barriers = refs[len(arrays) :]
        _run_thread(plan, inputs, out_refs, shared, barriers)

    kernel = plgpu.kernel(
        attend_forward,
        out_type=(
            jax.ShapeDtypeStruct(
                (plan.B, plan.Q * plan.query_block, plan.H, plan.K), plan.dtype
            ),
            jax.ShapeDtypeStruct(
                (plan.B, plan.G, plan.Q, plan.list_parts * PART), jnp.float32
            ),
        ),
        scratch_types=(
            mosaic_gpu_gather.shared_types(plan),
            mosaic_gpu_gather.barrier_types(plan),
        ),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.tiles.consumers + plan.tiles.teams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*arrays)


def _run_thread(plan, inputs, out_refs, shared, barriers):
    """What one warpgroup does."""
    tiles = plan.tiles
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < tiles.consumers)
    def _consumer():
        plgpu.set_max_registers(tiles.consumer_registers, action="increase")
        _consume(plan, inputs, out_refs, shared, barriers, warpgroup)

    @pl.when(warpgroup >= tiles.consumers)
    def _producer():
        plgpu.set_max_registers(tiles.producer_registers, action="decrease")
        mosaic_gpu_gather.produce(
            plan, inputs, shared, barriers, warpgroup - tiles.consumers
        )


class Consumer(NamedTuple):
    """A consumer warpgroup: its number, its team's, and which part of a tile it has."""

    number: Any
    team: Any
    offset: Any


def _consume(plan, inputs, out_refs, shared, barriers, warpgroup):
    """Attends with one part of each of a team's tiles."""
    tiles, laps = plan.tiles, mosaic_gpu_plan.count_laps(plan)
    team, offset = mosaic_gpu_plan.divide(warpgroup, tiles.parts)
    consumer = Consumer(warpgroup, team, offset)
    turn = barriers.turn.at[team]
    copy_rows = functools.partial(_copy_rows, plan, inputs, shared, barriers, consumer)

    def attend_tile(lap, start):
        buffer = mosaic_gpu_plan.rotate(lap, tiles.buffers, warpgroup)
        index = mosaic_gpu_plan.rotate(lap, tiles.buffers, team)
        plgpu.barrier_wait(barriers.q.at[buffer])
        plgpu.barrier_wait(barriers.lists.at[index])
        if tiles.parts > 1:
            pl.when((offset == 1) | (lap > 0))(lambda: plgpu.barrier_wait(turn))
        if plan.laps > 1:
            # The last output has left the buffer that the next queries fill.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(lap + 1 < laps)(lambda: copy_rows(lap + 1))
        place = mosaic_gpu_plan.locate(plan, team, lap)
        part = place.part + offset
        segment_ref = shared.segment_query.at[buffer] if plan.has_segments else None
        rows = mosaic_gpu_logits.describe_rows(
            plan, inputs, place, place.i, part, segment_ref
        )
        _, token_part = mosaic_gpu_plan.divide(part, plan.tile_token_parts)
        extent = mosaic_gpu_plan.measure(plan, shared.lists.at[index])
        task = mosaic_gpu_logits.Task(place, index, extent, token_part, rows)
        weigh = functools.partial(mosaic_gpu_logits.weigh, plan, inputs, shared, task)
        q_ref, lse_ref = shared.q.at[buffer], shared.lse.at[warpgroup]
        results = _attend(*(plan, q_ref, shared, barriers, team, start, extent, weigh))
        if tiles.parts > 1:
            pl.when((offset == 0) | (lap + 1 < laps))(
                lambda: plgpu.barrier_arrive(turn)
            )
        _store(plan, out_refs, place, part, (q_ref, lse_ref), results)
        plgpu.barrier_arrive(barriers.lists_free.at[index])
        return start + extent.steps

    copy_rows(jnp.int32(0))
    # Parts that take turns arrive to let the other go on. The second begins by that, and
    # each ends a tile by that, to wait for its turn only when it begins the next.
    if tiles.parts > 1:
        pl.when(offset == 1)(lambda: plgpu.barrier_arrive(turn))
    mosaic_gpu_plan.each_lap(plan, attend_tile, jnp.int32(0))
    if tiles.parts > 1:
        pl.when(offset == 0)(lambda: plgpu.barrier_wait(turn))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_rows(plan, inputs, shared, barriers, consumer, lap):
    """Starts the copies of a part's queries, and of the documents that they belong to."""
    place = mosaic_gpu_plan.locate(plan, consumer.team, lap)
    part = place.part + consumer.offset
    buffer = mosaic_gpu_plan.rotate(lap, plan.tiles.buffers, consumer.number)
    barrier = barriers.q.at[buffer]
    queries = [(inputs.q_BTHK, shared.q.at[buffer])]
    mosaic_gpu_gather.copy_queries(plan, inputs, place, part, queries, barrier)
    if plan.has_segments:
        _, token_part = mosaic_gpu_plan.divide(part, plan.token_parts)
        plgpu.copy_gmem_to_smem(
            inputs.segment_rows.at[place.b, place.i, pl.ds(token_part * PART, PART)],
            shared.segment_query.at[buffer],
            barrier,
        )


def _store(plan, out_refs, place, part, staged_refs, results):
    """Starts the copies of a part's outputs and lse, by way of shared memory."""
    acc, maximum, total = results
    out_ref, lse_ref = staged_refs
    empty = total == 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, total)
    acc *= lax.broadcast_in_dim(inverse, acc.shape, [0])
    lse = maximum * (1 / mosaic_gpu_plan.LOG2E) + jnp.log(jnp.where(empty, 1.0, total))
    out_ref[...] = acc.astype(plan.dtype)
    lse_ref[...] = jnp.where(empty, -jnp.inf, lse)
    plgpu.commit_smem()
    for rows, target, real in mosaic_gpu_plan.slice_part(plan, place[:3], part):

        @pl.when(real)
        def _store_slice(rows=rows, target=target):
            plgpu.copy_smem_to_gmem(out_ref.at[rows], out_refs[0].at[target])

    plgpu.copy_smem_to_gmem(
        lse_ref,
        out_refs[1].at[place.b, place.g, place.i, pl.ds(part * PART, PART)],
    )


def _attend(plan, q_ref, shared, barriers, team, start, extent, weigh):
    """Online softmax of a part over its key tiles.

    Args:
        start: key tiles that the team had before.
        extent: of the list.
        weigh: `mosaic_gpu_logits.weigh` of a tile and its products.
    Returns:
        The sum of weighted values, the largest logit in bits, and the sum of weights.
    """
    tiles, to_bits = plan.tiles, plan.to_bits

    def take_turn():
        if tiles.parts > 1:
            plgpu.barrier_arrive(barriers.turn.at[team])
            plgpu.barrier_wait(barriers.turn.at[team])

    def slot_of(step):
        return mosaic_gpu_plan.rotate(start + step, tiles.stages, team)

    def attend(whole, step, carry):
        acc, maximum, total = carry
        slot = slot_of(step)

        (s,) = mosaic_gpu_matmul.multiply(
            (q_ref, shared.k.at[slot].transpose((1, 0))), meanwhile=take_turn
        )
        # Bias and segments lie in the stage of the keys.
        keep_stage = plan.has_bias or plan.has_segments
        if not keep_stage:
            plgpu.barrier_arrive(barriers.k_free.at[slot])
        pieces, _ = weigh(mosaic_gpu_logits.Tile(whole, slot, step * plan.blocks), s)
        if keep_stage:
            plgpu.commit_smem()  # Orders what was read before the copy that comes next.
            plgpu.barrier_arrive(barriers.k_free.at[slot])

        largest = functools.reduce(jnp.maximum, pieces).max(axis=1) * to_bits
        largest = jnp.maximum(maximum, largest)
        decay = jnp.exp2(maximum - largest)
        shift = lax.broadcast_in_dim(largest, pieces[0].shape, [0])
        pieces = [jnp.exp2(x * to_bits - shift) for x in pieces]
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        total = total * decay + functools.reduce(jnp.add, pieces).sum(axis=1)
        p = mosaic_gpu_logits.join(plan, pieces)
        acc, total, largest, p = lax.optimization_barrier((acc, total, largest, p))
        if tiles.parts > 1:
            plgpu.barrier_arrive(barriers.turn.at[team])
        plgpu.barrier_wait(barriers.v.at[slot])
        if tiles.parts > 1:
            plgpu.barrier_wait(barriers.turn.at[team])

        def wait_for_keys():
            pl.when(step + 1 < extent.steps)(
                lambda: plgpu.barrier_wait(barriers.k.at[slot_of(step + 1)])
            )

        (acc,) = mosaic_gpu_matmul.multiply_add(
            plan, [acc], [(p, shared.v.at[slot])], wait_for_keys
        )
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        return acc, largest, total

    row = mosaic_gpu_logits.ROW
    carry = (
        mosaic_gpu_matmul.zeros(PART, plan.K, layout=plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((PART,), LOWEST, jnp.float32), row),
        mosaic_gpu_matmul.zeros(PART, layout=row),
    )
    pl.when(extent.steps > 0)(lambda: plgpu.barrier_wait(barriers.k.at[slot_of(0)]))
    for whole, first, end in mosaic_gpu_plan.stretches(plan, extent):
        carry = lax.fori_loop(first, end, functools.partial(attend, whole), carry)
    return carry
