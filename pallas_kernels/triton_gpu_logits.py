"""What the Triton kernels share: the rows of a tile, and logits with -inf where a row may not read.

The rows of a list are its query tokens times the H/G query heads that share it, head after
head: row r is token r % query_block of head r // query_block. Imported by the kernels alone,
since it needs Triton. Arrays lie as JAX has them; offsets are int64 from where they may pass
2^31.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(2**30)
"""Position of a key that isn't listed: after every query."""


@triton.jit
def is_row(part, plan: tl.constexpr):
    """Which rows of a part are a list's, and not padding."""
    row = part * plan.rows + tl.arange(0, plan.rows)
    return row < plan.heads * plan.query_block


@triton.jit
def place_rows(first_position_BQ_ptr, pair, i, part, plan: tl.constexpr):
    """Rows of a part of list i; `pair` counts batches and key/value heads.

    Returns:
        Their tokens; the position in k of the last key that each may read, -1 for a row of
        padding; and where rows lie in [B, T], [B, G, T], [B, H, T] and [B, T, H].
    """
    row = part * plan.rows + tl.arange(0, plan.rows)
    token = row % plan.query_block
    b = pair // plan.G
    h = pair % plan.G * plan.heads + tl.minimum(row // plan.query_block, plan.heads - 1)
    t = i * plan.query_block + token
    of_token = b.to(tl.int64) * plan.T + t
    of_group = pair.to(tl.int64) * plan.T + t
    of_head = (b * plan.H + h).to(tl.int64) * plan.T + t
    limit = tl.zeros_like(token) + (plan.num_keys - 1)
    if plan.causal:
        first = tl.load(first_position_BQ_ptr + b * plan.Q + i)
        limit = tl.minimum(first + token, limit)
    limit = tl.where(is_row(part, plan), limit, -1)
    return token, limit, of_token, of_group, of_head, of_token * plan.H + h


@triton.jit
def place_keys(pair, position, plan: tl.constexpr):
    """Where keys of a batch and head lie in [B, S] and in [B, S, G]."""
    of_key = (pair // plan.G).to(tl.int64) * plan.S + position
    return of_key, of_key * plan.G + pair % plan.G


@triton.jit
def load_heads(x_ptr, place, plan: tl.constexpr):
    """Heads at some places, one a row."""
    return tl.load(x_ptr + place[:, None] * plan.K + tl.arange(0, plan.K)[None, :])


@triton.jit
def store_heads(x_ptr, place, x, is_row, plan: tl.constexpr):
    """Undoes `load_heads`, but for rows of padding."""
    at = place[:, None] * plan.K + tl.arange(0, plan.K)[None, :]
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def weigh(s, limit, position, word, token, bias, segments, plan: tl.constexpr):
    """Logits of products, to be multiplied by `plan.to_bits`; -inf where a row may not read.

    All arguments broadcast against each other.

    Args:
        limit, token: of rows.
        position: of keys, in k.
        word: token mask of their block; with `plan.has_mask`.
        bias: with `plan.has_bias`.
        segments: of rows and of keys; with `plan.has_segments`.
    """
    if plan.is_scaled:
        s *= plan.scale
    if plan.has_bias:
        s += bias
    read = position <= limit
    if plan.has_mask:
        read &= (word >> token) & 1 == 1
    if plan.has_segments:
        read &= segments[0] == segments[1]
    return tl.where(read, s, float("-inf"))


@triton.jit
def take_blocks(block_id_BGQJ_ptr, of_list, j, count, plan: tl.constexpr):
    """The key blocks of a tile, from entry j of a list on: entries, are they listed, and ids.

    What isn't listed is some block, which must be masked.
    """
    slot = j + tl.arange(0, plan.blocks)
    listed = slot < count
    block_id = tl.load(block_id_BGQJ_ptr + of_list + slot, mask=listed, other=0)
    return slot, listed, block_id


@triton.jit
def place_blocks(block_id, plan: tl.constexpr):
    """Positions in k of the keys of a tile."""
    key = tl.arange(0, plan.key_block)
    return tl.reshape(block_id[:, None] * plan.key_block + key[None, :], plan.keys)


@triton.jit
def weigh_tile(s, rows, tile, of_list, of_key, ptrs, plan: tl.constexpr):
    """`weigh` of a tile with rows down and keys across.

    Args:
        rows: token, limit, and where rows lie in [B, T] and in [B, G, T].
        tile: of `take_blocks`.
        of_list: place of the list's first entry.
        of_key: where keys lie in [B, S].
        ptrs: of token masks, bias, and segment ids of queries and of keys.
    """
    token, limit, of_token, of_group = rows
    slot, listed, block_id = tile
    position = place_blocks(tl.where(listed, block_id, FAR // plan.key_block), plan)
    word, bias, segments = 0, 0.0, (0, 0)
    if plan.has_mask:
        word = tl.load(ptrs[0] + of_list + slot, mask=listed, other=0)
        word = tl.broadcast_to(word[:, None], plan.blocks, plan.key_block)
        word = tl.reshape(word, plan.keys)[None, :]
    if plan.has_bias:
        at = of_group[:, None] * plan.J + slot[None, :]
        bias = tl.load(ptrs[1] + at, mask=listed[None, :], other=0.0)[:, :, None]
        bias = tl.broadcast_to(bias, plan.rows, plan.blocks, plan.key_block)
        bias = tl.reshape(bias, plan.rows, plan.keys)
    if plan.has_segments:
        segments = (
            tl.load(ptrs[2] + of_token)[:, None],
            tl.load(ptrs[3] + of_key)[None, :],
        )
    return weigh(
        *(s, limit[:, None], position[None, :], word, token[:, None]),
        *(bias, segments, plan),
    )
