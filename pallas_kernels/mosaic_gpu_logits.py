"""Logits of a key tile in a Mosaic GPU kernel: scale, mods, bias, and who may read what.

Token mask, causality, the end of the keys and the end of the list are one bound a row on
the columns of a key block, so that all of them together cost a comparison an element.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_plan

PART = mosaic_gpu_plan.PART
FAR = 2**30
"""Position of a block that isn't listed: after every query."""
ROW = plgpu.Layout.WGMMA.reduce(1)
"""Registers of a vector with an element a row."""
COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""Registers of a vector with an element a column."""


class Rows(NamedTuple):
    """What the masks need to know of a part's rows; arrays are int32[64].

    `limit` is the position in k of the last key that causality lets a row read.
    """

    place: mosaic_gpu_plan.Place
    team: Any
    token_part: Any
    limit: Any
    token: Any
    head: Any
    q_id: Any
    segment: Any


def describe_rows(plan, inputs, shared, place, part, warpgroup):
    """The rows of a part, which a consumer warpgroup works on."""
    row = plgpu.broadcasted_iota(jnp.int32, (PART,), 0, layout=ROW) + part * PART
    token = row & (plan.query_block - 1)
    head = row >> (plan.query_block.bit_length() - 1)
    query_offset, key_offset = inputs.offset_2[0], inputs.offset_2[1]
    q_id = token + (place.i * plan.query_block + query_offset)
    limit = jnp.full_like(token, plan.num_keys - 1)
    if plan.causal:
        limit = jnp.minimum(q_id - key_offset, limit)
    segment = None
    if plan.has_segments:
        segment = plgpu.load(shared.segment_query.at[warpgroup], layout=ROW)
    team, _ = mosaic_gpu_plan.divide(warpgroup, plan.tiles.parts)
    _, token_part = mosaic_gpu_plan.divide(part, plan.token_parts)
    head += place.g * plan.heads
    return Rows(place, team, token_part, limit, token, head, q_id, segment)


def weigh(plan, inputs, shared, rows, slot, entry, s):
    """Logits of one key tile, with -inf where a row may not read.

    Args:
        slot: the stage that holds the tile.
        entry: of the list: the tile's first block.
        s: products of queries and keys, [64, tile].
    Returns:
        The logits, a piece for each key block; in nats, or to be scaled if not
        `plan.is_scaled`.
    """
    C = plan.key_block
    key_offset = inputs.offset_2[1]
    column = plgpu.broadcasted_iota(jnp.int32, (PART, C), 1, layout=plgpu.Layout.WGMMA)

    def spread(x, axis):
        return lax.broadcast_in_dim(x, (PART, C), [axis])

    pieces = []
    for p in range(plan.blocks):
        piece = s if plan.blocks == 1 else s[:, p * C : (p + 1) * C]
        block_id = shared.block_id[rows.team, entry + p]
        first = jnp.where(entry + p < rows.place.count, block_id * C, FAR)
        limit = rows.limit - first
        if plan.has_mask:
            chosen = (shared.token_mask[rows.team, entry + p] >> rows.token) & 1
            limit = jnp.where(chosen == 1, limit, -1)
        read = column <= spread(limit, 0)
        ids = ()
        if plan.score_mod or plan.mask_mod:
            k_id = column + (first + key_offset)
            ids = (rows.place.b, spread(rows.head, 0), spread(rows.q_id, 0), k_id)
        if plan.has_segments:
            segment = plgpu.load(
                shared.segment_key.at[slot, p, pl.ds(0, C)], layout=COLUMN
            )
            read &= spread(rows.segment, 0) == spread(segment, 1)
        if plan.mask_mod:
            read &= plan.mask_mod(*ids)
        if plan.is_scaled:
            piece *= plan.scale
        if plan.score_mod:
            piece = plan.score_mod(piece, *ids)
        if plan.has_bias:
            rows_of_part = pl.ds(rows.token_part * PART, PART)
            piece += spread(
                plgpu.load(shared.bias.at[slot, p, rows_of_part], layout=ROW), 0
            )
        pieces.append(jnp.where(read, piece, -jnp.inf))
    return pieces
