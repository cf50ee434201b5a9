"""Logits of a Mosaic TPU kernel: scale, mods, bias, and who may read what.

All of it is about one query block and one key block, [keys, rows of a part]: the forward
and dQ kernels meet many key blocks, the dK/dV kernel many query blocks.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_tpu_plan

LANES = mosaic_tpu_plan.LANES
HIDDEN = -1e30
"""Stands for a bias of -inf: finite, since it is multiplied by zeros."""


class Pair(NamedTuple):
    """A query block and a key block of its list.

    Attributes:
        b, g, i, n: scalars: batch, key/value head, query block, key block.
        real: bool scalar: whether n stands before the end of the list.
        token_mask: int32 scalar, or None.
        segment_query: int32[1, rows], or None.
        segment_key: int32[key_block, 1], or None.
        bias: float32[1, rows], or None.
    """

    b: Any
    g: Any
    i: Any
    n: Any
    real: Any
    token_mask: Any = None
    segment_query: Any = None
    segment_key: Any = None
    bias: Any = None


def weigh(plan, offset_ref, pair, part, s):
    """Logits of a pair for one part of the rows, with -inf where a row may not read.

    Args:
        s: products of keys and queries, [key_block, rows]; differentiable.
    """
    row = lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1)
    token = row & (plan.tokens - 1)
    head = pair.g * plan.heads + part * plan.part_heads
    head += row >> (plan.tokens.bit_length() - 1)
    key_offset = offset_ref[plan.B]
    q_id = token + (pair.i * plan.query_block + offset_ref[pair.b])
    first = pair.n * plan.key_block
    limit = jnp.full_like(row, plan.num_keys - 1) - first
    if plan.causal:
        limit = jnp.minimum(limit, q_id - (first + key_offset))
    if plan.has_mask:
        limit = jnp.where((pair.token_mask >> token) & 1 == 1, limit, -1)
    limit = jnp.where(pair.real, limit, -1)
    key = lax.broadcasted_iota(jnp.int32, s.shape, 0)
    read = key <= limit
    ids = (pair.b, head, q_id, key + (first + key_offset))
    if plan.has_segments:
        read &= pair.segment_key == pair.segment_query
    if plan.mask_mod:
        read &= plan.mask_mod(*ids)
    s *= plan.scale
    if plan.score_mod:
        s = plan.score_mod(s, *ids)
    if plan.has_bias:
        read &= pair.bias > HIDDEN / 2
        s += pair.bias
    return jnp.where(read, s, -jnp.inf)


def to_column(plan, segment):
    """Segment ids of a key block, int32[1, LANES], as [key_block, 1]."""
    shape = (plan.key_block, LANES)
    on_diagonal = _iota(shape, 0) == _iota(shape, 1)
    return jnp.where(on_diagonal, segment, 0).sum(axis=1, keepdims=True)


def read_bias(plan, bias_ref, entry, count):
    """Biases of `count` entries of a list, a row each: float32[count, rows].

    Args:
        bias_ref: float32[J * tokens / LANES, LANES], from `mosaic_tpu_plan.fold_lanes`.
    """
    pieces = []
    for p in range(count):
        place, chosen = _place_bias(plan, entry + p)
        pieces.append(jnp.where(chosen, bias_ref[place, :], 0.0))
    return mosaic_tpu_plan.dot(jnp.concatenate(pieces), _spread(plan), 1, 0)


def add_bias(plan, bias_ref, entry, x):
    """Adds float32[count, rows] to the biases of as many entries, summed over heads."""
    x = mosaic_tpu_plan.dot(x, _spread(plan), 1, 1)
    for p in range(x.shape[0]):
        place, chosen = _place_bias(plan, entry + p)
        bias_ref[place, :] += jnp.where(chosen, x[p : p + 1], 0.0)


def _place_bias(plan, entry):
    """Where an entry's biases lie: the register's row, and which of its lanes."""
    per_register = jnp.int32(plan.bias_entries)
    lane = _iota((1, LANES), 1)
    chosen = lane >> (plan.tokens.bit_length() - 1) == lax.rem(entry, per_register)
    return pl.ds(lax.div(entry, per_register), 1), chosen


def _spread(plan):
    """Ones where a lane and a row belong to the same token: float32[LANES, rows]."""
    shape, last = (LANES, plan.rows), plan.tokens - 1
    same = (_iota(shape, 0) & last) == (_iota(shape, 1) & last)
    return same.astype(jnp.float32)


def _iota(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)
