"""Logits of a key tile in a Mosaic GPU kernel: scale, mods, bias, and who may read what.

Token mask, causality, the end of the keys and the end of the list are one bound a row on
the columns of a key block, so that all of them together cost a comparison an element; a
tile that all rows read whole costs none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_exact, mosaic_gpu_plan

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

    limit: Any
    token: Any
    head: Any
    q_id: Any
    segment: Any


class Task(NamedTuple):
    """What a consumer of a list works on: the part's place, its list, and its rows.

    `index` says where the list lies in shared memory; `token_part` counts the parts of the
    tile's tokens.
    """

    place: mosaic_gpu_plan.Place
    index: Any
    extent: mosaic_gpu_plan.Extent
    token_part: Any
    rows: Rows


class Block(NamedTuple):
    """A key block: the position in k of its first key, and a word of the tokens that read it.

    Its keys' segments, and the bias of the rows, lie in shared memory. None: not part of
    this call.
    """

    first: Any
    word: Any
    segment_ref: Any
    bias_ref: Any


class Tile(NamedTuple):
    """A key tile: do all rows read it whole, the stage that holds it, its first entry."""

    whole: bool
    slot: Any
    entry: Any


def describe_rows(plan, inputs, place, i, part, segment_ref, layout=ROW):
    """The rows of a part of query block i.

    Args:
        place: says which batch and key/value head.
        segment_ref: ids of their documents, if the plan has segments.
        layout: of the registers: `ROW`, or `COLUMN` for what is transposed.
    """
    row = plgpu.broadcasted_iota(jnp.int32, (PART,), 0, layout=layout) + part * PART
    run = row >> (plan.run_rows.bit_length() - 1)
    place_in_run = row & (plan.run_rows - 1)
    token, head = (run, place_in_run) if plan.by_token else (place_in_run, run)
    q_id = token + inputs.first_id_BQ[place.b, i]
    # Without causality FAR keeps the shape of the sum: the compiler finds no layout else.
    limit = q_id - inputs.key_offset_1[0] if plan.causal else jnp.maximum(q_id, FAR)
    limit = jnp.minimum(limit, jnp.full_like(token, plan.num_keys - 1))
    segment = None
    if plan.has_segments:
        segment = plgpu.load(segment_ref, layout=layout)
    return Rows(limit, token, head + place.g * plan.heads, q_id, segment)


def score(plan, s, ids, with_slope=False):
    """Logits of products, before the bias; and their derivative by the logit, or None.

    They are in nats if `plan.is_scaled`, and to be scaled if not.
    """
    if plan.is_scaled:
        s *= plan.scale
    if plan.score_mod is None:
        return s, None
    if not with_slope:
        return mosaic_gpu_exact.refine(plan.score_mod)(s, *ids), None

    def mod(s, *ids):
        return jax.jvp(lambda s: plan.score_mod(s, *ids), (s,), (jnp.ones_like(s),))

    return mosaic_gpu_exact.refine(mod)(s, *ids)


def weigh(plan, inputs, shared, task, tile, s, with_slope=False):
    """Logits of one key tile, with -inf where a row may not read.

    Args:
        tile: `Tile`.
        s: products of queries and keys, [64, tile].
    Returns:
        For each key block the logits, and their slopes by `score`.
    """
    place, index, extent, token_part, rows = task
    whole, slot, entry = tile
    C = plan.key_block
    pieces, slopes = [], []
    for p, piece in enumerate(split(plan, s)):
        block_id = shared.lists[index, entry + p]
        first = jnp.where(entry + p < extent.count, block_id * C, FAR)
        word = segment_ref = bias_ref = None
        if plan.has_mask:
            word = shared.token_mask[index, entry + p]
        if plan.has_segments:
            segment_ref = shared.segment_key.at[slot, p, pl.ds(0, C)]
        if plan.has_bias:
            bias_ref = shared.bias.at[slot, p, pl.ds(token_part * PART, PART)]
        block = Block(first, word, segment_ref, bias_ref)
        piece, slope = weigh_block(
            *(plan, inputs, place.b, rows, block, piece), whole, with_slope
        )
        pieces.append(piece)
        slopes.append(slope)
    return pieces, slopes


def weigh_block(plan, inputs, b, rows, block, s, whole=False, with_slope=False):
    """Logits of one key block, with -inf where a row may not read.

    Args:
        b: batch.
        s: products of queries and keys, [64, C].
        whole: all rows read the whole block.
    Returns:
        The logits, and their slopes by `score`.
    """
    shape = (PART, plan.key_block)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)

    def spread(x, axis):
        return lax.broadcast_in_dim(x, shape, [axis])

    if not whole:
        limit = rows.limit - block.first
        if plan.has_mask:
            chosen = (block.word >> rows.token) & 1
            limit = jnp.where(chosen == 1, limit, -1)
        read = column <= spread(limit, 0)
    ids = ()
    if plan.score_mod or plan.mask_mod:
        k_id = column + (block.first + inputs.key_offset_1[0])
        ids = (b, spread(rows.head, 0), spread(rows.q_id, 0), k_id)
    if plan.has_segments:
        segment = plgpu.load(block.segment_ref, layout=COLUMN)
        read &= spread(rows.segment, 0) == spread(segment, 1)
    if plan.mask_mod:
        read &= plan.mask_mod(*ids)
    s, slope = score(plan, s, ids, with_slope)
    if plan.has_bias:
        s += spread(plgpu.load(block.bias_ref, layout=ROW), 0)
    return s if whole else jnp.where(read, s, -jnp.inf), slope


def split(plan, x):
    """The parts of a key tile's columns that belong to its blocks."""
    if plan.blocks == 1:
        return [x]
    C = plan.key_block
    return [x[:, p * C : (p + 1) * C] for p in range(plan.blocks)]


def join(plan, pieces):
    """Undoes `split`, in the dtype of the operands."""
    pieces = [x.astype(plan.dtype) for x in pieces]
    return pieces[0] if plan.blocks == 1 else jnp.concatenate(pieces, axis=1)


class Keys(NamedTuple):
    """64 keys of a tile; arrays are int32[64].

    Attributes:
        position: in k.
        block: of the tile, to which the key belongs.
        segment: ids of documents, or None.
        num_blocks, first_block: the blocks of the tile that these keys belong to.
    """

    position: Any
    block: Any
    segment: Any
    num_blocks: int
    first_block: Any


def describe_keys(plan, shared, tile, half):
    """The keys of a tile, or of its first or second half if it has 128."""
    key = plgpu.broadcasted_iota(jnp.int32, (PART,), 0, layout=ROW) + half * PART
    num_blocks = max(1, PART // plan.key_block)
    segment = None
    if plan.has_segments:
        segment = plgpu.load(shared.segment_key.at[half], layout=ROW)
    first_block = half * num_blocks if plan.blocks > num_blocks else 0
    block = key >> (plan.key_block.bit_length() - 1)
    return Keys(key + tile * plan.tiles.keys, block, segment, num_blocks, first_block)


def weigh_keys(plan, inputs, shared, b, keys, rows, words, slot, s):
    """Logits with keys down and rows across, -inf where a row may not read a key.

    Args:
        b: batch.
        words: for each block of the keys, which tokens read it; see `Readers`.
        slot: the stage that holds the rows.
        s: products of keys and queries, [64, 64].
    Returns:
        The logits, and their slopes by `score`.
    """

    def spread(x, axis):
        return lax.broadcast_in_dim(x, (PART, PART), [axis])

    def choose(values, blocks):
        """For each key what belongs to its block."""
        chosen = values[0]
        for p, value in list(enumerate(values))[1:]:
            chosen = jnp.where(blocks == keys.first_block + p, value, chosen)
        return chosen

    position = keys.position
    if plan.has_mask or plan.blocks > 1:
        word = choose(words, keys.block) + jnp.zeros_like(keys.block)
    if plan.blocks > 1 and not plan.has_mask:
        position = jnp.where(word != 0, position, FAR)
    read = spread(position, 0) <= spread(rows.limit, 1)
    if plan.has_mask:
        read &= ((spread(word, 0) >> spread(rows.token, 1)) & 1) == 1
    ids = ()
    if plan.score_mod or plan.mask_mod:
        k_id = spread(keys.position + inputs.key_offset_1[0], 0)
        ids = (b, spread(rows.head, 1), spread(rows.q_id, 1), k_id)
    if plan.has_segments:
        read &= spread(keys.segment, 0) == spread(rows.segment, 1)
    if plan.mask_mod:
        read &= plan.mask_mod(*ids)
    s, slope = score(plan, s, ids, with_slope=True)
    if plan.has_bias:
        biases = [
            spread(
                plgpu.load(shared.bias.at[slot, keys.first_block + p], layout=COLUMN), 1
            )
            for p in range(keys.num_blocks)
        ]
        s += choose(biases, spread(keys.block, 0))
    return jnp.where(read, s, -jnp.inf), slope
