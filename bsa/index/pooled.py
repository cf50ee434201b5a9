"""One choice for all tokens of a query block, by the mean of their queries: fewer searches. Called by `bsa.decode`.

Not causal: the first token of a block is led by the queries of the last. That is harmless where all of them are known
and none is predicted, as in a prompt; `bsa.parallel.select` refuses it everywhere else.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import build, route, settings, tree
from pallas_kernels import shapes


def refuse(index: settings.IndexSettings) -> None:
    """Raises ValueError if a token's choice would depend on later ones."""
    if index.granularity != "token":
        raise ValueError(
            f"index.granularity={index.granularity!r} lets a token's reading depend on later tokens, which training and "
            "evaluation predict; set it to 'token', and read prompts with --decode.granularity=block"
        )


def search_blocks(
    q_BTHK,
    keys,
    bookmarks: build.BookmarkIndex,
    open_blocks,
    place_BT,
    is_real_BT,
    index: settings.IndexSettings,
    **rules,
):
    """`route.search_blocks`, by query blocks where `index.granularity` says so and there is more than one token.

    A block's tokens may choose what is open to all of them; what stands for no token is no part of a block. Blocks that are
    cut by the first token or the last choose by those that are here, so pieces of whole query blocks choose alike.

    Args:
        place_BT: int32, places in the row of the tokens, which follow each other.
        is_real_BT: bool; what the others choose means nothing.
        rules: further arguments of `route.search_blocks`.
    """
    if index.granularity == "token" or place_BT.shape[1] == 1:
        return route.search_blocks(q_BTHK, keys, bookmarks, open_blocks, index, **rules)
    shapes.check(q_BTHK=q_BTHK, place_BT=place_BT, is_real_BT=is_real_BT)
    T, size = place_BT.shape[1], index.query_block
    offset_B = place_BT[:, 0] % size
    num = (T + 2 * size - 2) // size

    def blocks(x, fill):
        """[B, T, ...] to [B, Q, query_block, ...]."""
        whole = jnp.full((x.shape[0], num * size, *x.shape[2:]), fill, x.dtype)
        place = jax.vmap(
            lambda whole, x, i: lax.dynamic_update_slice_in_dim(whole, x, i, 0)
        )
        return place(whole, x, offset_B).reshape(x.shape[0], num, size, *x.shape[2:])

    q_BTHK = jnp.where(is_real_BT[..., None, None], q_BTHK, 0)
    is_real_BQt = blocks(is_real_BT, False)
    share_BQt = is_real_BQt / jnp.maximum(is_real_BQt.sum(2, keepdims=True), 1)
    q_BQHK = jnp.einsum("BQtHK,BQt->BQHK", blocks(q_BTHK, 0), share_BQt)
    low_BT, high_BT = open_blocks
    low_BQ = jnp.where(is_real_BQt, blocks(low_BT, 0), 0).max(2)
    high_BQ = blocks(high_BT, 0).min(2, initial=tree.NOWHERE, where=is_real_BQt)
    high_BQ = jnp.where(is_real_BQt.any(2), high_BQ, 0)
    choice_BGQA, scored_BGQ = route.search_blocks(
        q_BQHK, keys, bookmarks, (low_BQ, high_BQ), index, **rules
    )

    def tokens(x):
        """[B, G, Q, ...] to [B, G, T, ...]."""
        x = jnp.repeat(x, size, axis=2)
        cut = jax.vmap(lambda x, i: lax.dynamic_slice_in_dim(x, i, T, 1))
        return cut(x, offset_B)

    return tokens(choice_BGQA), tokens(scored_BGQ)
