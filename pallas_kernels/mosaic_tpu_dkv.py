"""Gradients of keys and values on TPUs in Pallas, over the lists turned round by `transpose`.

Called by `mosaic_tpu`. A program walks over one piece of a key block's readers; programs of
one block follow each other and add up in float32, so that no row is too long and no sum
depends on anything but the lists.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    mosaic_tpu_gather,
    mosaic_tpu_logits,
    mosaic_tpu_plan,
    transpose,
)

PIECE = 64
"""Readers of a piece: its list is streamed to SMEM as one row."""
COUNT, OWN = mosaic_tpu_plan.COUNT, mosaic_tpu_plan.OWN
ENTRIES = mosaic_tpu_plan.ENTRIES


class Operands(NamedTuple):
    """What the kernel reads; see `mosaic_tpu_plan` for the layouts, `mosaic_tpu_dq` for `stats`.

    Attributes:
        lists: of each piece; entries are query blocks, then the token masks if there are any.
        dk, dv: zeros, which become the gradients: blocks that nobody reads aren't written.
        bias: float32[pieces, PIECE * tokens / LANES, LANES].
    """

    lists: Any
    next_lists: Any
    offset: Any
    q: Any
    dout: Any
    stats: Any
    k: Any
    v: Any
    dk: Any
    dv: Any
    segment_query: Any = None
    segment_key: Any = None
    bias: Any = None


class Scratch(NamedTuple):
    """VMEM and the like. The key block's own arrays have two halves: one is being fetched.

    Attributes:
        state: int32[3], SMEM: the block of the program before, the half that it used, and
            whether gradients are on their way out.
    """

    q: Any
    dout: Any
    stats: Any
    segment_query: Any
    ring: mosaic_tpu_gather.Ring
    k: Any
    v: Any
    segment_key: Any
    dk: Any
    dv: Any
    dk_out: Any
    dv_out: Any
    own_arrived: Any
    left: Any
    state: Any


def turn_round(plan, selection, bias):
    """The lists of the pieces, and their biases: `Operands.lists` and `Operands.bias`.

    Args:
        bias: of the forward kernel's lists, or None.
    """
    B, G, Q, J = selection.block_id_BGQJ.shape
    readers = transpose.transpose(selection.block_id_BGQJ, selection.count_BGQ, plan.N)
    pieces = transpose.cut(readers, PIECE)
    place = pieces.first[..., None] + jnp.arange(PIECE, dtype=jnp.int32)

    def take(x, place):
        flat = jnp.take_along_axis(x, place.reshape(B, G, -1), -1, mode="clip")
        return flat.reshape(place.shape)

    # Past the end of a piece stand others' readers, or -1 where there are no more.
    entry = jnp.maximum(take(readers.entry, place), 0)
    i, j = entry // J, entry % J
    entries = [i]
    if plan.has_mask:
        mask = jax.lax.bitcast_convert_type(selection.token_mask_BGQJ, jnp.int32)
        entries.append(take(mask.reshape(B, G, Q * J), entry))
    lists = mosaic_tpu_plan.write_lists(
        pieces.last - pieces.first, pieces.block_id, *entries
    )
    if bias is None:
        return lists, None
    bias_rows = bias.reshape(-1, plan.J, plan.tokens)
    group = jnp.arange(B * G, dtype=jnp.int32).reshape(B, G, 1, 1)
    bias = bias_rows[group * Q + i, j].reshape(-1, PIECE, plan.tokens)
    return lists, mosaic_tpu_plan.fold_lanes(bias)


def run(plan, forward, selection, dout, stats):
    """Differentiates.

    Args:
        forward: the forward kernel's operands.
        dout, stats: as for `mosaic_tpu_dq.run`.
    Returns:
        dk and dv, laid out like k and v.
    """
    lists, bias = turn_round(plan, selection, forward.bias)
    zeros = jnp.zeros_like(forward.k)
    operands = Operands(
        **forward._asdict() | {"lists": lists, "next_lists": lists, "bias": bias},
        dout=dout,
        stats=stats,
        dk=zeros,
        dv=zeros,
    )
    pieces = operands.lists.shape[0]
    per_group = pieces // plan.groups
    grid = mosaic_tpu_plan.split_grid(plan, pieces, per_group)
    gathered = (operands.q, operands.dout, operands.stats, operands.segment_query)
    fits = max(1, plan.tiles.rows // (plan.parts * plan.rows))
    blocks = min(8, 1 << (fits.bit_length() - 1))
    slots = mosaic_tpu_plan.num_slots(plan, gathered, blocks)
    own = pltpu.VMEM((2, *operands.k.shape[1:]), plan.dtype)
    total = pltpu.VMEM(operands.k.shape[1:], jnp.float32)
    out = pltpu.VMEM(operands.k.shape[1:], plan.dtype)
    segment = operands.segment_key
    if plan.has_segments:
        segment = pltpu.VMEM((2, *segment.shape[1:]), segment.dtype)
    whole = mosaic_tpu_plan.unblocked(operands.dk)
    gradient = jax.ShapeDtypeStruct(operands.dk.shape, plan.dtype)
    return mosaic_tpu_plan.call(
        plan,
        lambda *refs: _run_program(plan, per_group, grid[1], *refs),
        grid,
        operands,
        _specs(operands, grid[1]),
        [(gradient, whole), (gradient, whole)],
        Scratch(
            *(mosaic_tpu_gather.buffer_type(x, slots, blocks) for x in gathered),
            mosaic_tpu_gather.ring_types(slots),
            own,
            own,
            segment,
            total,
            total,
            out,
            out,
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA,
            pltpu.SMEM((3,), jnp.int32),
        ),
        "bsa_dkv",
        {"dk": 0, "dv": 1},
    )


def _specs(operands, length):
    """Lists and biases program by program, all else whole."""
    specs = Operands(*(mosaic_tpu_plan.unblocked(x) for x in operands))
    lists, next_lists = mosaic_tpu_gather.list_specs(operands.lists, length)
    return specs._replace(
        lists=lists,
        next_lists=next_lists,
        offset=mosaic_tpu_plan.unblocked(operands.offset, pltpu.SMEM),
        bias=mosaic_tpu_plan.blocked(operands.bias, length),
    )


def _run_program(plan, per_group, length, inputs, dk_ref, dv_ref, scratch):
    """Adds one piece of a key block's readers; the block's last piece stores the sums."""
    lists = mosaic_tpu_gather.read_lists(inputs, length)
    program, state = lists.program, scratch.state
    n, next_n = lists.own_ref[OWN], lists.next_ref[OWN]
    group = lax.div(program, jnp.int32(per_group))
    ends_group = lax.rem(program + 1, jnp.int32(per_group)) == 0
    begins_group = lax.rem(program, jnp.int32(per_group)) == 0
    begins = begins_group | (state[0] != n)
    ends = ends_group | (next_n != n)

    def fetch_block(program, n, half):
        """Copies of a program's own key block; a piece without readers gets the last one."""
        group = lax.div(program, jnp.int32(per_group))
        n = jnp.minimum(n, plan.N - 1)
        b = lax.div(group, jnp.int32(plan.G))
        arrays = [
            (inputs.k, group * plan.N + n, scratch.k),
            (inputs.v, group * plan.N + n, scratch.v),
        ]
        if plan.has_segments:
            arrays.append((inputs.segment_key, b * plan.N + n, scratch.segment_key))
        return [
            pltpu.make_async_copy(x.at[at], y.at[half], scratch.own_arrived.at[half])
            for x, at, y in arrays
        ]

    @pl.when(lists.is_first)
    def _start():
        state[1] = 1
        state[2] = 0
        for copy in fetch_block(program, n, 0):
            copy.start()

    half = jnp.where(begins, 1 - state[1], state[1])
    state[0] = n
    state[1] = half

    @pl.when(begins)
    def _begin():
        for copy in fetch_block(program, n, half):
            copy.wait()
        scratch.dk[...] = jnp.zeros_like(scratch.dk)
        scratch.dv[...] = jnp.zeros_like(scratch.dv)

    @pl.when(ends & ~lists.is_last)
    def _fetch_next():
        for copy in fetch_block(program + 1, next_n, 1 - half):
            copy.start()

    _walk(plan, per_group, lists, inputs, scratch, half)

    def store():
        at = group * plan.N + jnp.minimum(n, plan.N - 1)
        return [
            pltpu.make_async_copy(x, y.at[at], scratch.left)
            for x, y in ((scratch.dk_out, dk_ref), (scratch.dv_out, dv_ref))
        ]

    def wait_for_stores():
        for copy in store():
            copy.wait()

    @pl.when(ends & (n < plan.N))
    def _store():
        pl.when(state[2] == 1)(wait_for_stores)
        scratch.dk_out[...] = scratch.dk[...].astype(plan.dtype)
        scratch.dv_out[...] = scratch.dv[...].astype(plan.dtype)
        for copy in store():
            copy.start()
        state[2] = 1

    pl.when(lists.is_last & (state[2] == 1))(wait_for_stores)


def _walk(plan, per_group, lists, inputs, scratch, half):
    """Adds up over the tiles of a piece."""
    own_ref, dot = lists.own_ref, mosaic_tpu_plan.dot
    k, v, n = scratch.k[half], scratch.v[half], own_ref[OWN]
    group = lax.div(lists.program, jnp.int32(per_group))
    b, g = lax.div(group, jnp.int32(plan.G)), lax.rem(group, jnp.int32(plan.G))
    column = None
    if plan.has_segments:
        column = mosaic_tpu_logits.to_column(plan, scratch.segment_key[half])
    blocks = scratch.q.shape[1]

    def differentiate(slot, entry):
        bias = None
        if plan.has_bias:
            bias = mosaic_tpu_logits.read_bias(plan, inputs.bias, entry, blocks)
        for p in range(blocks):
            place = ENTRIES + entry + p
            pair = mosaic_tpu_logits.Pair(
                b, g, own_ref[place], n, entry + p < own_ref[COUNT]
            )
            if plan.has_mask:
                pair = pair._replace(token_mask=own_ref[place + PIECE])
            if plan.has_segments:
                segment = scratch.segment_query[slot, p]
                pair = pair._replace(segment_query=segment, segment_key=column)
            if plan.has_bias:
                pair = pair._replace(bias=bias[p : p + 1])

            @pl.loop(0, plan.parts)
            def _differentiate_part(part, p=p, pair=pair):
                q, dout = scratch.q[slot, p, part], scratch.dout[slot, p, part]
                stats = scratch.stats[slot, p, part]

                def weigh(s):
                    return mosaic_tpu_logits.weigh(plan, inputs.offset, pair, part, s)

                s, pull = jax.vjp(weigh, dot(k, q, 1, 1))
                weight = jnp.exp(s - stats[0:1])
                ds = weight * (dot(v, dout, 1, 1) - stats[1:2])
                scratch.dv[...] += dot(weight.astype(plan.dtype), dout, 1, 0)
                (ds,) = pull(ds)
                scratch.dk[...] += dot(ds.astype(plan.dtype), q, 1, 0)

    def of_queries(program, i):
        return lax.div(program, jnp.int32(per_group)) * plan.Q + i

    def of_segments(program, i):
        return lax.div(program, jnp.int32(per_group * plan.G)) * plan.Q + i

    Stream = mosaic_tpu_gather.Stream
    streams = [
        Stream(inputs.q, scratch.q, of_queries),
        Stream(inputs.dout, scratch.dout, of_queries),
        Stream(inputs.stats, scratch.stats, of_queries),
        Stream(inputs.segment_query, scratch.segment_query, of_segments),
    ]
    mosaic_tpu_gather.walk(lists, scratch.ring, streams, blocks, differentiate)
