"""Queries that stand in query blocks, their attention to gathered blocks, and what joins its logits. Called by `attend`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import learn
from pallas_kernels import xla_group


def slices(x, first_B, num, axis):
    """`num` entries along an axis, in each row from its own first one on."""
    take = functools.partial(lax.dynamic_slice_in_dim, slice_size=num, axis=axis - 1)
    return jax.vmap(take)(x, first_B)


def by_lists(q_BTHK, lists, position_BT):
    """Queries as q_BGQTHK, where their bits stand in the masks, and the places place_BQT of those tokens."""
    B, _, H, K = q_BTHK.shape
    G, Q = lists.block_id_BGQJ.shape[1:3]
    block = lists.query_block
    offset_B = position_BT[:, 0] % block
    q = jnp.zeros((B, Q * block, H, K), q_BTHK.dtype)
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
    q = jax.vmap(put)(q, q_BTHK, offset_B)
    place_BT = (position_BT[:, 0] - offset_B)[:, None] + jnp.arange(Q * block)
    q_BGQTHK = q.reshape(B, Q, block, G, H // G, K).transpose(0, 3, 1, 2, 4, 5)
    return q_BGQTHK, place_BT.astype(jnp.int32).reshape(B, Q, block)


def from_lists(out_BGQTHK, lists, position_BT):
    """What such queries found, out_BTHK."""
    B, _, _, _, _, K = out_BGQTHK.shape
    out_BTGHK = out_BGQTHK.transpose(0, 2, 3, 1, 4, 5)
    out_BTHK = out_BTGHK.reshape(B, -1, out_BTGHK.shape[3] * out_BTGHK.shape[4], K)
    offset_B, T = position_BT[:, 0] % lists.query_block, position_BT.shape[1]
    return slices(out_BTHK, offset_B, T, axis=1)


def read_lists(
    q_BTHK, k_BGQJCK, v_BGQJCK, lists, position_BT, bias_BGQTJ, *, is_near, weigh
):
    """Attention of the new tokens to their lists; and, if asked for, how that of a single one fell on its blocks.

    Args:
        bias_BGQTJ: as `learn.block_bias` makes it, or None.
        is_near: the kernel's `mask_mod` of layers that cut inside a block, or None.
        weigh: whether to ask; of one token at a time only.
    Returns:
        out_BTHK, and mass_BGJ or None, see `attend.Reading`.
    """
    scale = q_BTHK.shape[-1] ** -0.5
    q_BGQTHK, place_BQT = by_lists(q_BTHK, lists, position_BT)
    num_keys = jnp.iinfo(jnp.int32).max
    rules = xla_group.Rules(scale, True, None, is_near, num_keys, q_BTHK.dtype)
    out_BGQTHK, lse_BGQTH = xla_group.attend_group(
        rules,
        xla_group.Queries(q_BGQTHK, bias_BGQTJ),
        xla_group.Blocks(k_BGQJCK, v_BGQJCK, ()),
        xla_group.Lists(
            lists.block_id_BGQJ,
            lists.token_mask_BGQJ,
            None,
            place_BQT,
        ),
        xla_group.Context(None, jnp.int32(0), (), ()),
    )
    out_BTHK = from_lists(out_BGQTHK, lists, position_BT)
    if not weigh:
        return out_BTHK, None
    s_BGHJC = scale * jnp.einsum(
        "BGHK,BGJCK->BGHJC",
        q_BGQTHK[:, :, 0, 0],
        k_BGQJCK[:, :, 0],
        preferred_element_type=jnp.float32,
    )
    if bias_BGQTJ is not None:
        s_BGHJC += bias_BGQTJ[:, :, 0, 0, None, :, None]
    C = lists.key_block
    id_BGJC = lists.block_id_BGQJ[:, :, 0, :, None] * C + jnp.arange(C)
    reads = (lists.token_mask_BGQJ[:, :, 0, :, None] > 0) & (
        id_BGJC <= position_BT[:, :, None, None]
    )
    share = jnp.exp(s_BGHJC - lse_BGQTH[:, :, 0, 0, :, None, None])
    return out_BTHK, jnp.where(reads[:, :, None], share, 0).sum(-1).mean(2)


def block_bias(queries, k_BGQJCK, grown, lists, position_BT, view, model):
    """`learn.block_bias` of listed blocks, with the queries of index and attention, and the blocks' keys."""
    q_BGQTHK, place_BQT = by_lists(queries[0], lists, position_BT)
    attending_BGQTHK, _ = by_lists(queries[1], lists, position_BT)
    B, _, T = place_BQT.shape
    take = jax.vmap(jax.vmap(lambda x, place: x[place]))
    place_BGQJ = jnp.maximum(lists.block_id_BGQJ, 0)
    bookmarks = grown.bookmarks
    digests = bookmarks.point_BGMRK, bookmarks.log_count_BGMR
    open_blocks = view(place_BQT.reshape(B, -1)).open_blocks
    return learn.block_bias(
        q_BGQTHK,
        [take(x, place_BGQJ) for x in digests],
        lists.block_id_BGQJ,
        [x.reshape(B, -1, T) for x in open_blocks],
        model.index,
        scale=model.K**-0.5,
        weight=model.score_weight,
        attending=(attending_BGQTHK, k_BGQJCK),
        mass_weight=model.mass_weight,
    )
