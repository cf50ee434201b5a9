"""Forward pass for Hopper GPUs in Pallas Mosaic GPU, called by `mosaic_gpu`.

A thread block works on one or two tiles of query rows (see `mosaic_gpu_plan`). For each, a
producer warpgroup gathers key tiles (see `mosaic_gpu_gather`); consumer warpgroups multiply
on the tensor cores and keep an online softmax in float32 registers. Two consumers of one
tile take turns: while one computes exponentials, the other has the tensor cores.

After JAX's `attention_mgpu.py` and FlashAttention-3 (arXiv 2407.08608).
"""

import functools

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
        _run_thread(plan, inputs, *refs[len(arrays) :])

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
        grid=(-(-plan.num_tiles // plan.tiles.teams),),
        grid_names=("program",),
        num_threads=plan.tiles.consumers + plan.tiles.teams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*arrays)


def _run_thread(plan, inputs, out_BTHK_ref, lse_rows_ref, shared, barriers):
    """What one warpgroup does."""
    tiles = plan.tiles
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < tiles.consumers)
    def _consumer():
        plgpu.set_max_registers(tiles.consumer_registers, action="increase")
        _consume(plan, inputs, out_BTHK_ref, lse_rows_ref, shared, barriers, warpgroup)

    @pl.when(warpgroup >= tiles.consumers)
    def _producer():
        plgpu.set_max_registers(tiles.producer_registers, action="decrease")
        mosaic_gpu_gather.produce(
            plan, inputs, shared, barriers, warpgroup - tiles.consumers
        )


def _consume(plan, inputs, out_BTHK_ref, lse_rows_ref, shared, barriers, warpgroup):
    """Attends with one part of a team's tile."""
    tiles = plan.tiles
    team, offset = mosaic_gpu_plan.divide(warpgroup, tiles.parts)
    place = mosaic_gpu_plan.locate(plan, inputs, team)
    part = place.part + offset
    q_ref, barrier = shared.q.at[warpgroup], barriers.q.at[warpgroup]
    mosaic_gpu_gather.copy_queries(
        plan, inputs, place, part, [(inputs.q_BTHK, q_ref)], barrier
    )
    _, token_part = mosaic_gpu_plan.divide(part, plan.token_parts)
    segment_ref = None
    if plan.has_segments:
        segment_ref = shared.segment_query.at[warpgroup]
        plgpu.copy_gmem_to_smem(
            inputs.segment_rows.at[place.b, place.i, pl.ds(token_part * PART, PART)],
            segment_ref,
            barrier,
        )
    plgpu.barrier_wait(barrier)
    plgpu.barrier_wait(barriers.lists.at[team])
    rows = mosaic_gpu_logits.describe_rows(
        plan, inputs, place, place.i, part, segment_ref
    )
    task = mosaic_gpu_logits.Task(place, team, token_part, rows)
    weigh = functools.partial(mosaic_gpu_logits.weigh, plan, inputs, shared, task)
    acc, maximum, total = _attend(plan, q_ref, shared, barriers, offset, task, weigh)

    empty = total == 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, total)
    acc *= lax.broadcast_in_dim(inverse, acc.shape, [0])
    lse = maximum * (1 / mosaic_gpu_plan.LOG2E) + jnp.log(jnp.where(empty, 1.0, total))
    q_ref[...] = acc.astype(plan.dtype)
    shared.lse.at[warpgroup][...] = jnp.where(empty, -jnp.inf, lse)
    plgpu.commit_smem()
    for rows, tokens, head, real in mosaic_gpu_plan.head_slices(plan, place.i, part):

        @pl.when(real)
        def _store(rows=rows, tokens=tokens, head=head):
            plgpu.copy_smem_to_gmem(
                q_ref.at[rows],
                out_BTHK_ref.at[place.b, tokens, place.g * plan.heads + head],
            )

    plgpu.copy_smem_to_gmem(
        shared.lse.at[warpgroup],
        lse_rows_ref.at[place.b, place.g, place.i, pl.ds(part * PART, PART)],
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend(plan, q_ref, shared, barriers, offset, task, weigh):
    """Online softmax of a part over its key tiles.

    Returns:
        The sum of weighted values, the largest logit in bits, and the sum of weights.
    """
    tiles, to_bits = plan.tiles, plan.to_bits
    team, steps = task.team, task.place.steps

    def take_turn():
        if tiles.parts > 1:
            plgpu.barrier_arrive(barriers.turn.at[team])
            plgpu.barrier_wait(barriers.turn.at[team])

    def slot_of(step):
        return team * tiles.stages + lax.rem(step, jnp.int32(tiles.stages))

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
            pl.when(step + 1 < steps)(
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
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(barriers.k.at[slot_of(0)]))
    pl.when(offset == 1)(take_turn)
    for whole, first, end in mosaic_gpu_plan.stretches(plan, task.place):
        carry = lax.fori_loop(first, end, functools.partial(attend, whole), carry)
    if tiles.parts > 1:
        pl.when(offset == 0)(take_turn)
    return carry
