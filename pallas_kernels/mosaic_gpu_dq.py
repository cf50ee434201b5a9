"""Gradients of queries and bias for Hopper GPUs, called by `mosaic_gpu_backward`.

Walks over the lists as the forward pass does, with the same producer, and recomputes the
weights from the lse: one matmul more than a fused pass needs, but no sum is shared between
thread blocks, so the same inputs give the same bits.

After the dQ kernel of JAX's `attention_mgpu.py` and FlashAttention-3 (arXiv 2407.08608).
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


def run(plan, operands, interpret):
    """Differentiates with respect to queries and bias.

    Returns:
        dq_BTHK, and the gradient of the bias as it belongs to rows, before the sum over
        heads: [B, G, Q, J, list_parts * 64], unwritten past the end of a list; or None.
    """
    arrays, tree = jax.tree.flatten(operands)
    num_rows = plan.list_parts * PART
    out_type = [jax.ShapeDtypeStruct(operands.q_BTHK.shape, plan.dtype)]
    if plan.has_bias:
        shape = (plan.B, plan.G, plan.Q, plan.J, num_rows)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))

    def attend_dq(*refs):
        inputs = tree.unflatten(refs[: len(arrays)])
        *out_refs, shared, barriers = refs[len(arrays) :]
        _run_thread(plan, inputs, out_refs, shared, barriers)

    kernel = plgpu.kernel(
        attend_dq,
        out_type=out_type,
        scratch_types=(
            mosaic_gpu_gather.shared_types(plan, backward=True),
            mosaic_gpu_gather.barrier_types(plan, backward=True),
        ),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.tiles.consumers + plan.tiles.teams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    dq_BTHK, *dbias_rows = kernel(*arrays)
    return dq_BTHK, *(dbias_rows or [None])


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


def _consume(plan, inputs, out_refs, shared, barriers, warpgroup):
    """Differentiates one part of a team's tile."""
    team, offset = mosaic_gpu_plan.divide(warpgroup, plan.tiles.parts)
    place = mosaic_gpu_plan.locate(plan, team, 0)
    part = place.part + offset
    q_ref, d_out_ref = shared.q.at[warpgroup], shared.d_out.at[warpgroup]
    _copy_rows(plan, inputs, shared, barriers, warpgroup, place, part)
    plgpu.barrier_wait(barriers.q.at[warpgroup])
    plgpu.barrier_wait(barriers.lists.at[team])
    segment_ref = shared.segment_query.at[warpgroup] if plan.has_segments else None
    rows = mosaic_gpu_logits.describe_rows(
        plan, inputs, place, place.i, part, segment_ref
    )
    _, token_part = mosaic_gpu_plan.divide(part, plan.tile_token_parts)
    extent = mosaic_gpu_plan.measure(plan, shared.lists.at[team])
    task = mosaic_gpu_logits.Task(place, team, extent, token_part, rows)
    row = mosaic_gpu_logits.ROW
    lse = plgpu.load(shared.lse.at[warpgroup], layout=row)
    delta = plgpu.load(shared.delta.at[warpgroup], layout=row)

    def spread(x):
        return lax.broadcast_in_dim(x, (PART, plan.key_block), [0])

    def differentiate(whole, step, acc):
        slot = team * plan.tiles.stages + lax.rem(step, jnp.int32(plan.tiles.stages))
        tile = mosaic_gpu_logits.Tile(whole, slot, step * plan.blocks)
        k_ref, v_ref = shared.k.at[slot], shared.v.at[slot]
        plgpu.barrier_wait(barriers.k.at[slot])
        plgpu.barrier_wait(barriers.v.at[slot])
        s, dp = mosaic_gpu_matmul.multiply(
            (q_ref, k_ref.transpose((1, 0))), (d_out_ref, v_ref.transpose((1, 0)))
        )
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        logits, slopes = mosaic_gpu_logits.weigh(
            plan, inputs, shared, task, tile, s, with_slope=True
        )
        ds = [
            jnp.exp2(x * plan.to_bits - spread(lse)) * (y - spread(delta))
            for x, y in zip(logits, mosaic_gpu_logits.split(plan, dp))
        ]
        if plan.has_bias:
            dbias_ref = shared.dbias.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for p, x in enumerate(ds):
                dbias_ref.at[p][...] = x.sum(axis=1)
            plgpu.commit_smem()
            rows_of_part = pl.ds(part * PART, PART)
            plgpu.copy_smem_to_gmem(
                dbias_ref,
                out_refs[1].at[
                    *(place.b, place.g, place.i),
                    *(pl.ds(tile.entry, plan.blocks), rows_of_part),
                ],
            )
        if plan.score_mod:
            ds = [x * slope for x, slope in zip(ds, slopes)]
        ds = mosaic_gpu_logits.join(plan, ds)
        (acc,) = mosaic_gpu_matmul.multiply_add(plan, [acc], [(ds, k_ref)])
        if plan.has_bias or plan.has_segments:
            plgpu.commit_smem()  # Orders what was read before the copy that comes next.
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        return acc

    acc = mosaic_gpu_matmul.zeros(PART, plan.K, layout=plgpu.Layout.WGMMA)
    for whole, first, end in mosaic_gpu_plan.stretches(plan, extent):
        acc = lax.fori_loop(first, end, functools.partial(differentiate, whole), acc)
    q_ref[...] = (acc * plan.scale).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.lists_free.at[team])
    for rows, target, real in mosaic_gpu_plan.slice_part(plan, place[:3], part):

        @pl.when(real)
        def _store(rows=rows, target=target):
            plgpu.copy_smem_to_gmem(q_ref.at[rows], out_refs[0].at[target])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_rows(plan, inputs, shared, barriers, warpgroup, place, part):
    """Starts the copies of what a consumer holds."""
    barrier = barriers.q.at[warpgroup]
    arrays = [
        (inputs.q_BTHK, shared.q.at[warpgroup]),
        (inputs.d_out_BTHK, shared.d_out.at[warpgroup]),
    ]
    mosaic_gpu_gather.copy_queries(plan, inputs, place, part, arrays, barrier)
    b, g, i, rows = place.b, place.g, place.i, pl.ds(part * PART, PART)
    vectors = [
        (inputs.lse_rows.at[b, g, i, rows], shared.lse),
        (inputs.delta_rows.at[b, g, i, rows], shared.delta),
    ]
    if plan.has_segments:
        _, token_part = mosaic_gpu_plan.divide(part, plan.token_parts)
        tokens = pl.ds(token_part * PART, PART)
        vectors.append((inputs.segment_rows.at[b, i, tokens], shared.segment_query))
    for gmem, smem in vectors:
        plgpu.copy_gmem_to_smem(gmem, smem.at[warpgroup], barrier)
