"""Queries through the index to the blocks that each token chooses. Called by `bsa.model.attention`.

Flat routing: every token scores every bookmark that is closed and outside its window. Work is tokens x bookmarks, memory
is one piece of `route_tokens` tokens at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import build, local, settings
from pallas_kernels import shapes


def choose_blocks(
    q_BTHK,
    k_BSGK,
    bookmarks: build.BookmarkIndex,
    view: local.LocalView,
    index: settings.IndexSettings,
    *,
    scale: float,
):
    """Picks the A blocks that each token most wants to read beyond its local view.

    A block scores logsumexp over its points of scale * q . point + log count: the logarithm of the attention mass it
    would get if each key were its point. With a shortlist (X > 0) the X best by points are scored again by their exact
    keys. Causal: block n is open to token t only from C tokens after the block's end, when it has left the window.
    Gradients stop here.

    Args:
        q_BTHK: queries, T = S tokens.
        k_BSGK: keys that the index was built from; read only by the exact step.
        scale: of the attention's logits.
    Returns:
        choice_BGTA: int32 block ids, best first, -1 where fewer blocks are open to the token.
    """
    sizes = shapes.check(
        q_BTHK=q_BTHK, k_BSGK=k_BSGK, point_BGMRK=bookmarks.point_BGMRK
    )
    B, T, H, G, K, M = (sizes[letter] for letter in "BTHGKM")
    q_BTHK, k_BSGK, bookmarks = lax.stop_gradient((q_BTHK, k_BSGK, bookmarks))
    k_BGMCK = k_BSGK.reshape(B, M, index.C, G, K).transpose(0, 3, 1, 2, 4)
    piece = min(index.route_tokens, T)
    pad = -T % piece

    def pieces(x, axis):
        x = jnp.pad(
            x, [(0, pad if i == axis else 0) for i in range(x.ndim)], mode="edge"
        )
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], -1, piece, *x.shape[axis + 1 :]), axis, 0
        )

    # [G, H/G] heads: those of a group share a list.
    q = pieces(q_BTHK.reshape(B, T, G, H // G, K), 1)
    low_BT, high_BT = _open_blocks(view)

    def choose(arguments):
        q, low, high = arguments
        score = _point_scores(q, bookmarks, index.query_pool, scale)
        block = jnp.arange(M, dtype=jnp.int32)
        is_open = (block >= low[:, None, :, None]) & (block < high[:, None, :, None])
        score = _pool_heads(score, is_open, index.query_pool)
        best, choice = _top(score, index.X or index.A)
        if index.X:
            exact = _exact_scores(q, k_BGMCK, choice, index.query_pool, scale)
            exact = _pool_heads(exact, best > -jnp.inf, index.query_pool)
            best, place = _top(exact, index.A)
            choice = jnp.take_along_axis(choice, place, -1)
        return jnp.where(best > -jnp.inf, choice, -1).astype(jnp.int32)

    choice = lax.map(choose, (q, pieces(low_BT, 1), pieces(high_BT, 1)))
    choice = jnp.moveaxis(choice, 0, 2).reshape(B, G, T + pad, -1)[:, :, :T]
    return jnp.pad(
        choice, [(0, 0)] * 3 + [(0, index.A - choice.shape[-1])], constant_values=-1
    )


def _open_blocks(view):
    """First block, and the one after the last, that each token may choose: whole blocks of its document, no sinks."""
    whole = -(-view.start_BT // view.key_block)
    return jnp.maximum(whole, view.first_BT + view.sink_blocks), view.low_BT


def _point_scores(q, bookmarks, query_pool, scale):
    """Scores of all bookmarks: [B, G, H/G, T, M], with one query for all heads of a group where they are pooled."""
    q = q.astype(jnp.float32) * scale
    if query_pool == "mean":
        q = q.mean(3, keepdims=True)
    logit = jnp.einsum("btghk,bgmrk->bghtmr", q, bookmarks.point_BGMRK)
    return jax.nn.logsumexp(logit + bookmarks.log_count_BGMR[:, :, None, None], axis=-1)


def _exact_scores(q, k_BGMCK, choice, query_pool, scale):
    """The same for the blocks of each token's shortlist, over their own keys: [B, G, H/G, T, X]."""
    q = q.astype(jnp.float32) * scale
    if query_pool == "mean":
        q = q.mean(3, keepdims=True)

    def of_group(q_THK, k_MCK, choice_TX):
        def of_token(arguments):
            q_HK, choice_X = arguments
            logit_HXC = jnp.einsum(
                "hk,xck->hxc", q_HK, k_MCK[choice_X].astype(jnp.float32)
            )
            return jax.nn.logsumexp(logit_HXC, axis=-1)

        return lax.map(of_token, (q_THK, choice_TX), batch_size=64)

    score = jax.vmap(jax.vmap(of_group))(jnp.moveaxis(q, 2, 1), k_BGMCK, choice)
    return jnp.moveaxis(score, 3, 2)


def _pool_heads(score, is_open, query_pool):
    """Scores of heads to scores of their group, [B, G, T, M]; -inf where a token may not look.

    Sums of softmaxes weigh every head alike (the NSA paper's rule); a single pooled query needs none.
    """
    score = jnp.where(is_open[:, :, None], score, -jnp.inf)
    if query_pool == "mean":
        return score[:, :, 0]
    share = jnp.where(is_open[:, :, None], jax.nn.softmax(score, axis=-1), 0).sum(2)
    return jnp.where(is_open, share, -jnp.inf)


def _top(score, num):
    """The best `num` (or all, if there are fewer) and their places; equal scores go to the lower place."""
    return lax.top_k(score, min(num, score.shape[-1]))
