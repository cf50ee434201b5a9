"""Figures that tell whether selection works: how much is read, how evenly bookmarks are used. Called by the model."""

import jax.numpy as jnp

from bsa.index import local
from pallas_kernels import selection, shapes


def attended_tokens(lists: selection.BlockSelection, start_BT):
    """Keys that each query reads, counted exactly: causal, and inside the query's document.

    Args:
        start_BT: int32, place in the row where each token's document begins.
    Returns:
        float32[B, T], the mean over the G lists.
    """
    shapes.check(start_BT=start_BT, block_id_BGQJ=lists.block_id_BGQJ)
    B, T = start_BT.shape
    block, C = lists.query_block, lists.key_block
    place_Qt = jnp.arange(T, dtype=jnp.int32).reshape(1, 1, -1, 1, block)
    start = start_BT.reshape(B, 1, -1, 1, block)
    begin = lists.block_id_BGQJ[..., None] * C
    overlap = jnp.minimum(begin + C - 1, place_Qt) - jnp.maximum(begin, start) + 1
    bit = jnp.arange(block, dtype=jnp.uint32)
    reads = ((lists.token_mask_BGQJ[..., None] >> bit) & 1).astype(bool)
    keys = jnp.where(reads, jnp.maximum(overlap, 0), 0).sum(3)
    return keys.mean(1, dtype=jnp.float32).reshape(B, T)


def bookmark_use(choice_BGTA, view: local.LocalView, num_bookmarks: int):
    """How evenly the bookmarks that somebody could choose were chosen.

    Returns:
        entropy: nats, of the share of choices that fell on each bookmark; log of their number if all are alike.
        unread: share of the bookmarks that no token chose. Both are means over rows and heads; 0 where no bookmark was
        open to any token.
    """
    shapes.check(choice_BGTA=choice_BGTA, low_BT=view.low_BT)
    B, G, T, _ = choice_BGTA.shape
    row = jnp.arange(B * G, dtype=jnp.int32).reshape(B, G, 1, 1) * (num_bookmarks + 1)
    place = row + jnp.where(choice_BGTA < 0, num_bookmarks, choice_BGTA)
    count = (
        jnp.zeros(B * G * (num_bookmarks + 1), jnp.float32)
        .at[place.reshape(-1)]
        .add(1.0)
    )
    count_BGM = count.reshape(B, G, num_bookmarks + 1)[..., :-1]
    share = count_BGM / jnp.maximum(count_BGM.sum(-1, keepdims=True), 1)
    entropy = -jnp.where(
        share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0
    ).sum(-1)

    # Bookmark n opens to the first token of block n + window, if that is still of n's document.
    block = jnp.arange(num_bookmarks, dtype=jnp.int32)
    reader = (block + view.num_blocks) * view.key_block
    inside = reader < T
    reader = jnp.minimum(reader, T - 1)
    whole = -(-view.start_BT // view.key_block)
    first = jnp.maximum(whole, view.first_BT + view.sink_blocks)[:, reader]
    could_BM = inside & (block >= first)
    unread = (could_BM[:, None] & (count_BGM == 0)).sum(-1) / jnp.maximum(
        could_BM.sum(-1), 1
    )[:, None]
    return entropy.mean(), unread.mean()
