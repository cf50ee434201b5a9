"""How candidates are judged: by digest or by keys, a group's heads together; and which of the best are worth reading.

Called by `route`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import digest, precision, settings, tree, turn

GATHERED_BYTES = 2**30
"""Of candidates that are gathered at once, where the compiler doesn't fuse gathering with scoring."""


def count_batch(token_bytes):
    """Tokens whose candidates are gathered at once, a power of two."""
    return 1 << max(0, (GATHERED_BYTES // token_bytes).bit_length() - 1)


def score(q_HK, judged, index: settings.IndexSettings, level: int = 0):
    """`digest.score`, of each token where spans differ in length; NaN for one of none.

    The log of the confidence with which it begins joins that of a learned span. Points and queries are
    rounded to what they are compared in, so that a kernel finds the same.

    Args:
        judged: see `build.BookmarkIndex.judged`.
        level: 0 of bookmarks, above that of chapters.
    """
    node, turn_M = judged
    point_MRK, log_count_MR = precision.unpack(*node)
    q_HK = precision.round_query(q_HK, precision.compared(index, level))
    point_MRK = precision.round_point(point_MRK, precision.compared(index, level))
    score_HM = digest.score(
        index.digest, q_HK, point_MRK, log_count_MR, index.point_pool
    )
    if index.span_blocks == 1:
        return score_HM
    score_HM -= digest.log_tokens(index.digest, log_count_MR)
    return score_HM if turn_M is None else score_HM + turn.log_confidence(turn_M)


def best_by_points(q, judged, choice, index: settings.IndexSettings):
    """The best of each token's choice by their digests, as many as it can afford.

    Args:
        q: queries of each group's heads [B, G, T, H/G, K], as `digest.widen` makes them.
        judged: of the bookmarks, see `build.BookmarkIndex.judged`.
        choice: int32 ids [B, G, T, X], -1 for none.
    """

    def rate(q_HK, judged, id_X):
        return score(q_HK, jax.tree.map(lambda x: x[id_X], judged), index)

    return _best_again(q, judged, choice, index, rate, index.R)


def best_by_keys(q, keys, choice, index: settings.IndexSettings, read):
    """The A best of each token's choice by the blocks' own keys; arguments as for `route.search_blocks`."""

    def rate(q_HK, keys, id_X):
        k_XCK = read(keys, id_X).astype(jnp.float32)
        q_HK = q_HK[:, : k_XCK.shape[-1]]
        return jax.nn.logsumexp(jnp.einsum("hk,xck->hxc", q_HK, k_XCK), axis=-1)

    return _best_again(q, keys, choice, index, rate, index.C)


def _best_again(q, known, choice, index, rate, vectors):
    """The A best of each token's choice, scored again.

    Args:
        rate: function (q_HK, what is known of a row and head, id_X) -> score_HX.
        vectors: of a candidate that it reads.
    """
    B, G, _, _, K = q.shape
    batch = count_batch(4 * B * G * choice.shape[-1] * vectors * K)

    def of_group(q_THK, known, choice_TX):
        def of_token(arguments):
            q_HK, choice_X = arguments
            score_HX = rate(q_HK, known, jnp.maximum(choice_X, 0))
            score_X = pool_heads(score_HX, choice_X >= 0, index.query_pool)
            score_A, choice_A = tree.rank(score_X, choice_X, index.A)
            if has_budget(index):
                return _affordable(score_A, choice_A, index)
            return choice_A

        return lax.map(of_token, (q_THK, choice_TX), batch_size=batch)

    return jax.vmap(jax.vmap(of_group))(q, known, choice)


def has_budget(index: settings.IndexSettings) -> bool:
    """Whether a token may choose fewer than A though more are open to it."""
    return index.top_p < 1 or index.min_share > 0


def _affordable(score_A, choice_A, index):
    """Of choices, best first, those that `top_p` and `min_share` leave; -1 for the others."""
    is_there = choice_A >= 0
    if index.query_pool == "mean":
        score_A = jax.nn.softmax(score_A, where=is_there)
    share_A = jnp.where(is_there, score_A, 0)
    share_A /= jnp.maximum(share_A.sum(), 1e-30)
    before_A = jnp.cumsum(share_A) - share_A
    keeps = (before_A < index.top_p) & (share_A >= index.min_share)
    return jnp.where(keeps, choice_A, -1)


def pool_heads(score, is_open, query_pool: str):
    """Scores of heads [..., H/G, X] to scores of their group [..., X]; -inf where a token may not look, or for NaN.

    Sums of softmaxes weigh every head alike (the NSA paper's rule); a single pooled query needs none.
    """
    is_open &= ~jnp.isnan(score).any(-2)
    score = jnp.where(is_open[..., None, :], score, -jnp.inf)
    if query_pool == "mean":
        return score[..., 0, :]
    share = jnp.where(is_open[..., None, :], jax.nn.softmax(score, axis=-1), 0).sum(-2)
    return jnp.where(is_open, share, -jnp.inf)
