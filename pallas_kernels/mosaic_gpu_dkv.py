"""Gradients of keys and values for Hopper GPUs, called by `mosaic_gpu_backward`.

A thread block holds a key tile and walks over a piece of its row of readers (see
`mosaic_gpu_readers`): a producer warpgroup copies 64 rows of queries and cotangents a step,
two consumer warpgroups recompute the transposed weights and add to sums in registers (for
key blocks of 16 or 32 see `mosaic_gpu_dkv_narrow`). The sums of the pieces of a tile are added
up by `mosaic_gpu_sum`, always in the same order.

After the dK and dV kernel of JAX's `attention_mgpu.py` and FlashAttention-3 (arXiv
2407.08608).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    mosaic_gpu_dkv_narrow,
    mosaic_gpu_gather,
    mosaic_gpu_logits,
    mosaic_gpu_matmul,
    mosaic_gpu_plan,
)

PART = mosaic_gpu_plan.PART
CONSUMERS = mosaic_gpu_dkv_narrow.CONSUMERS


class Shared(NamedTuple):
    """Shared memory; the first axis counts sections of the key tile, stages, or consumers."""

    k: Any
    v: Any
    segment_key: Any
    q: Any
    d_out: Any
    lse: Any
    delta: Any
    bias: Any
    segment_query: Any
    weights: Any  # of narrow blocks only


class Barriers(NamedTuple):
    """The key tile; a stage's arrival, and its release by the consumers."""

    keys: Any
    rows: Any
    free: Any


class Place(NamedTuple):
    """A program's place: batch, key/value head, piece; key tile, first entry, entries."""

    b: Any
    g: Any
    piece: Any
    tile: Any
    first: Any
    entries: Any


def run(plan, operands, readers, interpret):
    """Differentiates with respect to keys and values.

    Args:
        plan: with `tiles.HopperKeyTiles`.
        operands: keys, values and their segments padded to whole tiles.
        readers: `Readers` of the key tiles.
    Returns:
        The sums of each piece for dK, which lack the scale, and for dV: float32
        [B, G, P, tile, K], or [B, G, P, blocks, K, C] of narrow blocks.
    """
    arrays, tree = jax.tree.flatten((operands, readers))
    num_pieces = readers.tile_BGP.shape[-1]
    num_tiles = readers.first_piece_BGN.shape[-1] - 1
    shape = (plan.B, plan.G, num_pieces)
    if is_narrow(plan):
        shape += (plan.blocks, plan.K, plan.key_block)
        consume = mosaic_gpu_dkv_narrow.consume
    else:
        shape += (plan.tiles.keys, plan.K)
        consume = _consume

    def attend_dkv(*refs):
        inputs, readers = tree.unflatten(refs[: len(arrays)])
        dk_ref, dv_ref, shared, barriers = refs[len(arrays) :]
        place = _locate(plan, readers, num_pieces, num_tiles)
        # Read word by word where it lies: a bulk copy that starts at any entry traps.
        table_FE = readers.table_BGFE.at[place.b, place.g]
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def _consumer():
            plgpu.set_max_registers(plan.tiles.consumer_registers, action="increase")
            out_refs = [x.at[place.b, place.g, place.piece] for x in (dk_ref, dv_ref)]
            consume(
                plan, inputs, place, table_FE, out_refs, shared, barriers, warpgroup
            )

        @pl.when(warpgroup == CONSUMERS)
        def _producer():
            plgpu.set_max_registers(plan.tiles.producer_registers, action="decrease")
            _produce(plan, inputs, place, table_FE, shared, barriers)

    kernel = plgpu.kernel(
        attend_dkv,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2,
        scratch_types=(_shared_types(plan), _barrier_types(plan)),
        grid=(plan.B * plan.G * num_pieces,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*arrays)


def is_narrow(plan):
    """Whether a key block is less than the 64 rows of a product."""
    return plan.key_block < PART


def _divide_keys(plan):
    """Sections of a key tile, and their keys: one for each consumer, or one for both."""
    sections = CONSUMERS if is_narrow(plan) else plan.tiles.keys // PART
    return sections, plan.tiles.keys // sections


def _shared_types(plan):
    """Shared memory of a thread block."""
    stages, (sections, keys) = plan.tiles.stages, _divide_keys(plan)
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matrix(*shape):
        return plgpu.SMEM(shape, plan.dtype, transforms=transforms)

    def vector(dtype, *shape):
        return plgpu.SMEM(shape, dtype)

    ids = jnp.int32 if plan.has_segments else None
    weights = None
    if is_narrow(plan):
        weights = matrix(CONSUMERS, 2 * plan.key_block, PART)
    return Shared(
        k=matrix(sections, keys, plan.K),
        v=matrix(sections, keys, plan.K),
        segment_key=ids and vector(ids, sections, keys),
        q=matrix(stages, PART, plan.K),
        d_out=matrix(stages, PART, plan.K),
        lse=vector(jnp.float32, stages, PART),
        delta=vector(jnp.float32, stages, PART),
        bias=vector(jnp.float32, stages, plan.blocks, PART) if plan.has_bias else None,
        segment_query=ids and vector(ids, stages, PART),
        weights=weights,
    )


def _barrier_types(plan):
    """Barriers of a thread block, which count an arrival a copy."""
    sections, _ = _divide_keys(plan)
    row_copies = 2 * plan.part_slices + 2 + plan.has_segments
    row_copies += plan.blocks * plan.has_bias
    return Barriers(
        keys=plgpu.Barrier(num_arrivals=sections * (2 + plan.has_segments)),
        rows=plgpu.Barrier(num_arrivals=row_copies, num_barriers=plan.tiles.stages),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.tiles.stages),
    )


def _locate(plan, readers, num_pieces, num_tiles):
    """The place of a program; one without a piece has no entries."""
    rest, piece = mosaic_gpu_plan.divide(lax.axis_index("program"), num_pieces)
    b, g = mosaic_gpu_plan.divide(rest, plan.G)
    tile = jnp.minimum(readers.tile_BGP[b, g, piece], num_tiles - 1)
    first = readers.first_BGP[b, g, piece]
    return Place(b, g, piece, tile, first, readers.last_BGP[b, g, piece] - first)


def _produce(plan, inputs, place, table_FE, shared, barriers):
    """Copies the key tile, then rows as fast as the consumers release stages."""
    b, g, _, tile, first, entries = place
    sections, num_keys = _divide_keys(plan)
    for section in range(sections):
        keys = pl.ds(tile * plan.tiles.keys + section * num_keys, num_keys)
        copies = [
            (inputs.k_BSGK.at[b, keys, g], shared.k),
            (inputs.v_BSGK.at[b, keys, g], shared.v),
        ]
        if plan.has_segments:
            copies.append((inputs.segment_key_BS.at[b, keys], shared.segment_key))
        for gmem, smem in copies:
            plgpu.copy_gmem_to_smem(gmem, smem.at[section], barriers.keys)

    def load(step, part, entry, i):
        # The next step's, so that nobody waits for it.
        following = table_FE[0, first + jnp.where(entry + 1 < entries, entry + 1, 0)]
        slot = lax.rem(step, jnp.int32(plan.tiles.stages))
        barrier = barriers.rows.at[slot]
        pl.when(step >= plan.tiles.stages)(
            lambda: plgpu.barrier_wait(barriers.free.at[slot])
        )
        for rows, source, _ in mosaic_gpu_plan.slice_part(plan, (b, g, i), part):
            for x_BTHK, smem in (
                (inputs.q_BTHK, shared.q),
                (inputs.d_out_BTHK, shared.d_out),
            ):
                plgpu.copy_gmem_to_smem(x_BTHK.at[source], smem.at[slot, rows], barrier)
        _, token_part = mosaic_gpu_plan.divide(part, plan.token_parts)
        rows, tokens = (pl.ds(x * PART, PART) for x in (part, token_part))
        copies = [
            (inputs.lse_rows.at[b, g, i, rows], shared.lse.at[slot]),
            (inputs.delta_rows.at[b, g, i, rows], shared.delta.at[slot]),
        ]
        if plan.has_segments:
            copies.append(
                (inputs.segment_rows.at[b, i, tokens], shared.segment_query.at[slot])
            )
        if plan.has_bias:
            for p in range(plan.blocks):
                # A block that isn't listed gets the bias of slot 0, and will be masked.
                j = table_FE[1 + plan.blocks + p, first + entry]
                copies.append(
                    (inputs.bias_rows.at[b, g, i, j, tokens], shared.bias.at[slot, p])
                )
        for gmem, smem in copies:
            plgpu.copy_gmem_to_smem(gmem, smem, barrier)
        return following

    mosaic_gpu_plan.each_step(plan, entries, load, table_FE[0, first])
    steps = entries * plan.num_parts
    mosaic_gpu_gather.drain(plan.tiles.stages, steps, [barriers.free])


def _consume(plan, inputs, place, table_FE, out_refs, shared, barriers, warpgroup):
    """Adds up what the rows of a piece say of a consumer's keys, and stores it."""

    plgpu.barrier_wait(barriers.keys)

    def accumulate(half, wanted):
        sums = _accumulate(
            plan, inputs, place, table_FE, shared, barriers, half, wanted
        )
        for index, x in zip(wanted, sums):
            out_refs[index].at[pl.ds(half * PART, PART)][...] = x

    if plan.tiles.keys > PART:
        pl.when(place.entries > 0)(lambda: accumulate(warpgroup, (0, 1)))
    else:
        for index in range(2):
            mine = (place.entries > 0) & (warpgroup == index)
            pl.when(mine)(lambda index=index: accumulate(0, (index,)))


def _accumulate(plan, inputs, place, table_FE, shared, barriers, half, wanted):
    """The sums for 64 keys.

    Args:
        half: of the key tile.
        wanted: of 0, dK without the scale, and 1, dV.
    """
    keys = mosaic_gpu_logits.describe_keys(plan, shared, place.tile, half)

    def spread(x):
        return lax.broadcast_in_dim(x, (PART, PART), [1])

    def add_rows(step, part, entry, accs):
        slot = lax.rem(step, jnp.int32(plan.tiles.stages))
        plgpu.barrier_wait(barriers.rows.at[slot])
        entry += place.first
        words = [
            table_FE[1 + keys.first_block + p, entry] for p in range(keys.num_blocks)
        ]
        q_ref, d_out_ref = shared.q.at[slot], shared.d_out.at[slot]

        def add(_, accs):
            # Hidden, or addresses of keys are made before the loop, and spilled.
            hidden = lax.optimization_barrier(jnp.int32(half))
            k_ref, v_ref = shared.k.at[hidden], shared.v.at[hidden]
            pairs = [(k_ref, q_ref.transpose((1, 0)))]
            if 0 in wanted:
                pairs.append((v_ref, d_out_ref.transpose((1, 0))))
            s, *dp = mosaic_gpu_matmul.multiply(*pairs)
            segment_ref = shared.segment_query.at[slot] if plan.has_segments else None
            rows = mosaic_gpu_logits.describe_rows(
                *(plan, inputs, place, table_FE[0, entry], part, segment_ref),
                layout=mosaic_gpu_logits.COLUMN,
            )
            logits, slope = mosaic_gpu_logits.weigh_keys(
                plan, inputs, shared, place.b, keys, rows, words, slot, s
            )
            column = mosaic_gpu_logits.COLUMN
            lse = plgpu.load(shared.lse.at[slot], layout=column)
            p = jnp.exp2(logits * plan.to_bits - spread(lse))
            factors = {1: (p.astype(plan.dtype), d_out_ref)}
            if 0 in wanted:
                delta = plgpu.load(shared.delta.at[slot], layout=column)
                ds = p * (dp[0] - spread(delta))
                ds = ds if slope is None else ds * slope
                factors[0] = (ds.astype(plan.dtype), q_ref)
            return mosaic_gpu_matmul.multiply_add(
                plan, accs, [factors[index] for index in wanted]
            )

        if plan.blocks > 1:
            # None or one round: a tile's reader may read none of these keys.
            listed = words[0]
            for word in words[1:]:
                listed |= word
            accs = lax.fori_loop(0, jnp.where(listed != 0, 1, 0), add, accs)
        else:
            accs = add(0, accs)
        plgpu.commit_smem()  # Orders what was read before the copy that comes next.
        plgpu.barrier_arrive(barriers.free.at[slot])
        return accs

    zeros = mosaic_gpu_matmul.zeros(PART, plan.K, layout=plgpu.Layout.WGMMA)
    accs = [zeros] * len(wanted)
    return mosaic_gpu_plan.each_step(plan, place.entries, add_rows, accs)
