"""A call fitted to the tiles of a Mosaic GPU kernel: blocks, padding, and what rows need."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_plan, tiles

BLOCKS = (16, 32, 64, 128)
"""Query and key blocks that fill tiles, tokens."""
SHORT_BLOCKS = (1, 2, 4, 8)
"""Query blocks whose rows fill parts if enough query heads share a list."""
COPY_ROWS = 8
"""Fewest rows of a tile that a copy fills."""
WIDTHS = (64, 128, 256)
"""Head widths; smaller ones are padded with zeros."""
MAX_LIST = 3040
"""Entries of a list that fit in shared memory beside the tiles."""
MAX_SHORT_LIST = 1536
"""The same for `SHORT_BLOCKS`, of whose biases a tile needs one for each of its rows."""

INSTEAD = "use implementation='xla' (any device) or 'reference' (small inputs)"


def prepare(sizes, rules, interpret, differentiated, others):
    """What a kernel over lists needs.

    Args:
        sizes: function from rows and entries of a list and padded head width to tiles.
        rules: `Options` whose offsets don't matter.
        differentiated: q, k, v and bias, as the caller has them.
        others: selection, segment ids, and the ids of the first token of each query block
            and of the first key: int32[B, Q], int32[1].
    Returns:
        `Plan`, `Operands`, and the selection with blocks that fit a tile.
    Raises:
        NotImplementedError: lists are too long.
    """
    q_BTHK, k_BSGK, v_BSGK, bias_BGTJ = differentiated
    selection, segment_ids, (first_id_BQ, key_offset_1) = others
    (B, _, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    width = next(x for x in WIDTHS if x >= K)
    entries = selection.block_id_BGQJ.shape[-1]
    of_list = sizes(H // G * selection.query_block, width, entries)
    if selection.key_block > of_list.keys:
        selection, bias_BGTJ = halve_blocks(selection, bias_BGTJ)
    # Lists end at whole tiles, and start at multiples of 128 bytes.
    J = round_up(selection.block_id_BGQJ.shape[-1], 32)
    longest = MAX_SHORT_LIST if selection.query_block in SHORT_BLOCKS else MAX_LIST
    if J > longest:
        raise NotImplementedError(
            f"mosaic_gpu has lists of at most {longest} entries, not J={J}: {INSTEAD}"
        )
    plan = mosaic_gpu_plan.Plan(
        B=B,
        H=H,
        G=G,
        K=width,
        Q=selection.count_BGQ.shape[-1],
        J=J,
        query_block=selection.query_block,
        key_block=selection.key_block,
        num_keys=S,
        dtype=jnp.dtype(q_BTHK.dtype),
        has_mask=selection.token_mask_BGQJ is not None,
        has_bias=bias_BGTJ is not None,
        has_segments=segment_ids is not None,
        tiles=of_list,
        processors=tiles.hopper_processors(jax.devices()[0]),
        interpreted=bool(interpret),
        scale=rules.scale,
        causal=rules.causal,
        score_mod=rules.score_mod,
        mask_mod=rules.mask_mod,
    )
    tokens, keys = count_tokens(plan), round_up(S, plan.key_block)
    query_BT, key_BS = (None, None) if segment_ids is None else segment_ids
    mask_BGQJ = selection.token_mask_BGQJ
    if plan.has_mask:
        mask_BGQJ = jax.lax.bitcast_convert_type(mask_BGQJ, jnp.int32)
    operands = mosaic_gpu_plan.Operands(
        q_BTHK=pad(q_BTHK, {1: tokens, 3: width}),
        k_BSGK=pad(k_BSGK, {1: keys, 3: width}),
        v_BSGK=pad(v_BSGK, {1: keys, 3: width}),
        lists=_make_lists(plan, selection, first_id_BQ - key_offset_1),
        first_id_BQ=first_id_BQ,
        key_offset_1=key_offset_1,
        token_mask_BGQJ=pad(mask_BGQJ, {3: J}),
        bias_rows=_spread_bias(plan, pad(bias_BGTJ, {2: tokens, 3: J})),
        segment_rows=_spread_tokens(plan, pad(query_BT, {1: tokens})),
        segment_key_BS=pad(key_BS, {1: keys}),
    )
    return plan, operands, selection


def list_query_blocks(heads):
    """Tokens that a query block may have if so many query heads share a list."""
    if heads < COPY_ROWS or heads & (heads - 1):
        return BLOCKS
    short = [x for x in SHORT_BLOCKS if heads * x % mosaic_gpu_plan.PART == 0]
    return (*short, *BLOCKS)


def count_tokens(plan):
    """Query tokens, with those of padding."""
    return plan.Q * plan.query_block


def halve_blocks(selection, bias_BGTJ):
    """The same lists with key blocks half as long, for a key tile shorter than a block."""

    def double(x_J):
        return None if x_J is None else jnp.repeat(x_J, 2, axis=-1)

    block_id_BGQJ = double(selection.block_id_BGQJ)
    half_J = jnp.arange(block_id_BGQJ.shape[-1], dtype=jnp.int32) % 2
    halved = dataclasses.replace(
        selection,
        block_id_BGQJ=jnp.where(block_id_BGQJ < 0, -1, 2 * block_id_BGQJ + half_J),
        count_BGQ=2 * selection.count_BGQ,
        token_mask_BGQJ=double(selection.token_mask_BGQJ),
        key_block=selection.key_block // 2,
    )
    return halved, double(bias_BGTJ)


def _make_lists(plan, selection, position_BQ):
    """`Operands.lists`, which begin with the blocks that all rows read whole.

    Args:
        position_BQ: of the first token of each query block, in k.
    """
    count_BGQ1 = selection.count_BGQ[..., None]
    block_id_BGQJ = pad(selection.block_id_BGQJ, {3: plan.J})
    whole_BGQ1 = jnp.zeros_like(count_BGQ1)
    if plan.has_whole_blocks:
        block_id_BGQJ, whole_BGQ1 = _put_whole_first(
            plan, block_id_BGQJ, count_BGQ1, position_BQ
        )
    lists = jnp.concatenate([block_id_BGQJ, count_BGQ1, whole_BGQ1], axis=-1)
    return pad(lists, {3: plan.J + mosaic_gpu_plan.HEAD})


def _put_whole_first(plan, block_id_BGQJ, count_BGQ1, position_BQ):
    """Blocks that all rows of a list read whole before the others, and their number."""
    entry_J = jnp.arange(plan.J, dtype=jnp.int32)
    end_BQ = jnp.full_like(position_BQ, plan.num_keys)
    if plan.causal:
        end_BQ = jnp.minimum(position_BQ + 1, end_BQ)
    whole_BGQJ = (block_id_BGQJ + 1) * plan.key_block <= end_BQ[:, None, :, None]
    whole_BGQJ &= entry_J < count_BGQ1
    # Both parts keep their order. A sort is one launch; a cumsum and a scatter are several.
    order_BGQJ = jnp.where(whole_BGQJ, entry_J, entry_J + plan.J)
    _, block_id_BGQJ = jax.lax.sort(
        (order_BGQJ, block_id_BGQJ), num_keys=1, is_stable=False
    )
    return block_id_BGQJ, whole_BGQJ.sum(-1, keepdims=True, dtype=jnp.int32)


def to_rows(plan, x_BHT, fill):
    """Numbers of query heads and tokens as those of rows, [B, G, Q, list_parts * 64]."""
    x_BHT = pad(x_BHT, {2: count_tokens(plan)}, fill)
    x = x_BHT.reshape(plan.B, plan.G, plan.heads, plan.Q, plan.query_block)
    x = x.swapaxes(2, 3)
    x = x.swapaxes(3, 4) if plan.by_token else x
    x_rows = x.reshape(plan.B, plan.G, plan.Q, -1)
    return pad(x_rows, {3: plan.list_parts * mosaic_gpu_plan.PART}, fill)


def from_rows(plan, x_rows):
    """Undoes `to_rows`, but for the tokens of padding."""
    x = split_rows(plan, x_rows)
    return x.swapaxes(2, 3).reshape(plan.B, plan.H, count_tokens(plan))


def split_rows(plan, x_rows):
    """[..., rows] as [..., heads, tokens of a query block], without rows of padding."""
    x_rows = x_rows[..., : plan.heads * plan.query_block]
    if plan.by_token:
        x = x_rows.reshape(*x_rows.shape[:-1], plan.query_block, plan.heads)
        return x.swapaxes(-1, -2)
    return x_rows.reshape(*x_rows.shape[:-1], plan.heads, plan.query_block)


def _spread_tokens(plan, x_BT):
    """`Operands.segment_rows`."""
    if x_BT is None:
        return None
    return _fill_parts(plan, x_BT.reshape(plan.B, plan.Q, plan.query_block))


def _spread_bias(plan, bias_BGTJ):
    """`Operands.bias_rows`."""
    if bias_BGTJ is None:
        return None
    bias_BGQTJ = bias_BGTJ.reshape(plan.B, plan.G, plan.Q, plan.query_block, plan.J)
    return _fill_parts(plan, bias_BGQTJ.swapaxes(3, 4))


def _fill_parts(plan, x):
    """Copies of the tokens of query blocks, the last axis, for the rows of `token_parts` parts."""
    if plan.by_token:
        return jnp.repeat(x, plan.heads, axis=-1)
    return jnp.tile(x, plan.part_slices)


def round_up(x, multiple):
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def pad(x, sizes, fill=0):
    """Pads axes at their ends up to sizes, {axis: size}; None passes through."""
    if x is None:
        return None
    padding = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    if not any(after for _, after in padding):
        return x
    return jnp.pad(x, padding, constant_values=fill)


def find_delta(out_BTHK, lse_BHT, d_out_BTHK, d_lse_BHT):
    """What backward kernels weigh logits by; a row that read nothing gets no weight.

    d(loss)/d(logit) = exp(logit - lse) * (d_out . v - delta): FlashAttention-2 (arXiv
    2307.08691), with the cotangent of the lse.

    Returns:
        lse_BHT, inf for a row that read nothing, and delta_BHT.
    """
    empty_BHT = lse_BHT == -jnp.inf
    delta_BHT = jnp.einsum(
        "BTHK,BTHK->BHT",
        *(x.astype(jnp.float32) for x in (out_BTHK, d_out_BTHK)),
        precision=jax.lax.Precision.HIGHEST,
    )
    delta_BHT = jnp.where(empty_BHT, 0.0, delta_BHT - d_lse_BHT)
    return jnp.where(empty_BHT, jnp.inf, lse_BHT), delta_BHT
