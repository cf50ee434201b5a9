"""Forward pass for TPUs in Pallas, called by `mosaic_tpu`; decoding runs it too.

A program attends with one query block: it walks over tiles of key blocks gathered along the
block's list (see `mosaic_tpu_gather`) and keeps an online softmax in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu_gather, mosaic_tpu_logits, mosaic_tpu_plan

LOWEST = -1e30
"""Running maximum of a row that has met no key: finite, so that no inf is subtracted."""


class Operands(NamedTuple):
    """What the forward and dQ kernels read; see `mosaic_tpu_plan` for the layouts.

    Attributes:
        lists: entries are key blocks, then their token masks if there are any.
        next_lists: the same array; a program sees the next program's list in it.
        offset: int32[B + 1]: of each sequence's queries, of keys.
        bias: float32[B * G * Q, J * tokens / LANES, LANES].
    """

    lists: Any
    next_lists: Any
    offset: Any
    q: Any
    k: Any
    v: Any
    segment_query: Any = None
    segment_key: Any = None
    bias: Any = None


class Scratch(NamedTuple):
    """VMEM and the like of the forward kernel."""

    k: Any
    v: Any
    segment_key: Any
    ring: mosaic_tpu_gather.Ring
    acc: Any
    maximum: Any
    total: Any


def run(plan, operands):
    """Attends.

    Returns:
        out as [B * G * Q, parts, rows, K], and lse as [B * G * Q, parts, 1, rows].
    """
    grid = mosaic_tpu_plan.split_grid(plan, plan.groups * plan.Q)
    stat = (plan.parts, 1, plan.rows)
    out = jax.ShapeDtypeStruct(operands.q.shape, plan.dtype)
    lse = jax.ShapeDtypeStruct((operands.q.shape[0], *stat), jnp.float32)
    ring = ring_scratch(plan, operands)
    return mosaic_tpu_plan.call(
        plan,
        lambda *refs: _run_program(plan, grid[1], *refs),
        grid,
        operands,
        specs(plan, operands, grid[1]),
        [(x, mosaic_tpu_plan.blocked(x, grid[1])) for x in (out, lse)],
        Scratch(
            *ring,
            acc=pltpu.VMEM((plan.parts, plan.K, plan.rows), jnp.float32),
            maximum=pltpu.VMEM(stat, jnp.float32),
            total=pltpu.VMEM(stat, jnp.float32),
        ),
        "bsa_forward",
    )


def ring_scratch(plan, operands):
    """Scratch of `walk`: buffers of k, v and segment ids, and the ring."""
    gathered = (operands.k, operands.v, operands.segment_key)
    slots = mosaic_tpu_plan.num_slots(plan, gathered, plan.blocks)
    return (
        *(mosaic_tpu_gather.buffer_type(x, slots, plan.blocks) for x in gathered),
        mosaic_tpu_gather.ring_types(slots),
    )


def specs(plan, operands, length):
    """Where each operand is when a program runs: its own block, or all of it."""
    lists, next_lists = mosaic_tpu_gather.list_specs(operands.lists, length)
    blocked = mosaic_tpu_plan.blocked
    whole = mosaic_tpu_plan.unblocked

    def of_tokens(program):
        _, b, _, i = locate(plan, program)
        return b * plan.Q + i

    return Operands(
        lists,
        next_lists,
        whole(operands.offset, pltpu.SMEM),
        blocked(operands.q, length),
        whole(operands.k),
        whole(operands.v),
        blocked(operands.segment_query, length, of_tokens),
        whole(operands.segment_key),
        blocked(operands.bias, length),
    )


def locate(plan, program):
    """Group, batch, key/value head and query block of a program."""
    group = lax.div(program, jnp.int32(plan.Q))
    b, g = lax.div(group, jnp.int32(plan.G)), lax.rem(group, jnp.int32(plan.G))
    return group, b, g, lax.rem(program, jnp.int32(plan.Q))


def walk(plan, lists, inputs, scratch, work):
    """Calls work(k, v, entry, pairs) for each tile of key blocks of a program's list.

    `k` and `v` are [keys, K]; `pairs` are as many `mosaic_tpu_logits.Pair` as the tile has
    blocks, each a slice of `key_block` keys.
    """
    _, b, g, i = locate(plan, lists.program)

    def of_keys(program, n):
        return lax.div(program, jnp.int32(plan.Q)) * plan.N + n

    def of_segments(program, n):
        return lax.div(program, jnp.int32(plan.Q * plan.G)) * plan.N + n

    def work_on(slot, entry):
        own_ref = lists.own_ref
        bias = None
        if plan.has_bias:
            bias = mosaic_tpu_logits.read_bias(plan, inputs.bias, entry, plan.blocks)
        pairs = []
        for p in range(plan.blocks):
            place = mosaic_tpu_plan.ENTRIES + entry + p
            pair = mosaic_tpu_logits.Pair(
                b, g, i, own_ref[place], entry + p < own_ref[mosaic_tpu_plan.COUNT]
            )
            if plan.has_mask:
                pair = pair._replace(token_mask=own_ref[place + plan.J])
            if plan.has_segments:
                column = mosaic_tpu_logits.to_column(plan, scratch.segment_key[slot, p])
                pair = pair._replace(
                    segment_query=inputs.segment_query[...], segment_key=column
                )
            if plan.has_bias:
                pair = pair._replace(bias=bias[p : p + 1])
            pairs.append(pair)
        tile = (plan.blocks * plan.key_block, plan.K)
        k, v = scratch.k[slot].reshape(tile), scratch.v[slot].reshape(tile)
        work(k, v, entry, pairs)

    Stream = mosaic_tpu_gather.Stream
    streams = [
        Stream(inputs.k, scratch.k, of_keys),
        Stream(inputs.v, scratch.v, of_keys),
        Stream(inputs.segment_key, scratch.segment_key, of_segments),
    ]
    mosaic_tpu_gather.walk(lists, scratch.ring, streams, plan.blocks, work_on)


def weigh_tile(plan, inputs, pairs, part, s):
    """Logits of a tile, [keys, rows], from its products."""
    C = plan.key_block
    pieces = [
        mosaic_tpu_logits.weigh(plan, inputs.offset, x, part, s[p * C : (p + 1) * C])
        for p, x in enumerate(pairs)
    ]
    return jnp.concatenate(pieces)


def _run_program(plan, length, inputs, out_ref, lse_ref, scratch):
    """Attends with one query block."""
    dot = mosaic_tpu_plan.dot
    scratch.acc[...] = jnp.zeros_like(scratch.acc)
    scratch.maximum[...] = jnp.full_like(scratch.maximum, LOWEST)
    scratch.total[...] = jnp.zeros_like(scratch.total)

    def attend(k, v, entry, pairs):
        @pl.loop(0, plan.parts)
        def _attend_part(part):
            s = dot(k, inputs.q[part], 1, 1)
            s = weigh_tile(plan, inputs, pairs, part, s)
            before = scratch.maximum[part]
            maximum = jnp.maximum(before, s.max(axis=0, keepdims=True))
            decay = jnp.exp(before - maximum)
            p = jnp.exp(s - maximum)
            total = p.sum(axis=0, keepdims=True)
            scratch.maximum[part] = maximum
            scratch.total[part] = scratch.total[part] * decay + total
            out = dot(v, p.astype(plan.dtype), 0, 0)
            scratch.acc[part] = scratch.acc[part] * decay + out

    lists = mosaic_tpu_gather.read_lists(inputs, length)
    walk(plan, lists, inputs, scratch, attend)

    @pl.loop(0, plan.parts)
    def _store(part):
        total = scratch.total[part]
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        out_ref[part] = (scratch.acc[part] / total).T.astype(plan.dtype)
        lse = scratch.maximum[part] + jnp.log(total)
        lse_ref[part] = jnp.where(empty, -jnp.inf, lse)
