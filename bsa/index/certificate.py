"""Chapters to proofs that scoring every bookmark would have found nothing better. Called by experiments.

A ball around a chapter's members bounds their scores: q.k <= q.centre + |q| radius (Ram and Gray, arXiv 1202.6101). Where no
chapter that was left aside could hold a better bookmark than the worst of those wanted, the choice is the flat route's.
"""

import jax
import jax.numpy as jnp

from bsa.index import build, digest, judge, precision, settings, tree
from pallas_kernels import shapes

ROUNDING = 2e-5
"""Share of lengths by which float32 sums of a few hundred products may be off."""


def prove(
    q_BTHK,
    bookmarks: build.BookmarkIndex,
    open_blocks,
    index: settings.IndexSettings,
    *,
    scale: float,
):
    """Whether chapters prove that each token's choice is the one that scoring every open bookmark would give.

    What is proven are the bookmarks that a coarse to fine search finds, so what the exact step, a budget or spans make of
    them is too. Hops along links only add to these, and are not looked at.

    Args:
        q_BTHK: queries of a few tokens; memory is T x M.
        open_blocks: low_BT and high_BT, as `route.open_blocks`.
    Returns:
        proven_BGT: bool; true where no chapter was left aside, as in a flat route.
    Raises:
        ValueError: the route looks at no query, or a group's heads have a softmax each, over what a search scores.
    """
    sizes = shapes.check(q_BTHK=q_BTHK, log_count_BGMR=bookmarks.log_count_BGMR)
    B, T, H, G, K = (sizes[letter] for letter in "BTHGK")
    if index.query_pool != "mean" or index.route in settings.PATTERNS:
        raise ValueError(
            f"index: query_pool={index.query_pool!r} with route={index.route!r} has no scores that a ball could bound; only "
            "query_pool='mean' with flat, chapters or graph has"
        )
    if not bookmarks.chapters:
        return jnp.ones((B, G, T), bool)
    q_BGTHK = q_BTHK.reshape(B, T, G, H // G, K).astype(jnp.float32) * scale
    q_BGTK = digest.widen(index.digest, q_BGTHK).mean(3)

    def of_group(q_TK, judged, member_M, low_T, high_T):
        scores = [
            judge.score(q_TK, node, index, level) for level, node in enumerate(judged)
        ]
        q_TK = precision.round_query(q_TK, precision.compared(index, 0))
        if member_M is None:
            member_M = jnp.arange(scores[1].shape[1] * index.chapter_bookmarks)
        (bookmarks, _), *_ = judged
        bound_TE = _bound(q_TK, *precision.unpack(*bookmarks), member_M, index)

        def of_token(scores, bound_E, low, high):
            return _is_proven(scores, bound_E, member_M, low, high, index)

        return jax.vmap(of_token)(scores, bound_TE, low_T, high_T)

    of_row = jax.vmap(of_group, in_axes=(0, 0, 0, None, None))
    q_BGTK = q_BGTK.swapaxes(1, 2)
    judged, member_BGM = bookmarks.judged, bookmarks.member_BGM
    return jax.vmap(of_row)(q_BGTK, judged, member_BGM, *open_blocks)


def _is_proven(scores, bound_E, member_M, low, high, index):
    """Whether all chapters that a search for one token leaves aside are worse than the worst of what it finds.

    Args:
        scores: of all nodes, level by level.
        member_M: the bookmarks of one chapter after those of another.
    """
    group = index.chapter_bookmarks
    first, end = tree.taking_part(low, high, group, index.volume_chapters)

    def rate(level, id_X, is_open_X):
        score = scores[level + 1]
        score_X = score if id_X is None else score[id_X]
        return judge.pool_heads(score_X[None], is_open_X, index.query_pool)

    id_X, _ = tree.search(
        rate,
        [score.shape[0] for score in scores[1:]],
        first,
        end,
        group=group,
        volume=1,
        beam=index.beam,
        num=index.beam,
    )
    place_E = jnp.arange(bound_E.shape[0])
    is_aside_E = (place_E >= first) & (place_E < end)
    is_aside_E &= (place_E[:, None] != id_X).all(1)
    place_M = jnp.arange(scores[0].shape[0])
    is_seen_M = (place_M >= low) & (place_M < high)
    is_seen_M &= ~jnp.zeros_like(is_seen_M).at[member_M].set(
        jnp.repeat(is_aside_E, group)
    )
    score_M = judge.pool_heads(scores[0][None], is_seen_M, index.query_pool)
    score_X, _ = tree.rank(score_M, place_M, index.X or index.A)
    return (~is_aside_E | (bound_E < score_X[-1])).all()


def _bound(q_TK, point_MRK, log_count_MR, member_M, index):
    """What no member of a chapter can score more than, bound_TE; -inf for chapters of no token.

    A mixture's score is at most that of all its tokens at its best point; that of other digests is linear. The log of a
    learned span's confidence only lowers it.
    """
    M = point_MRK.shape[0]
    query_TK = digest.lift(index.digest, q_TK)
    point_MRK = point_MRK.reshape(M, -1, query_TK.shape[1])
    is_there_MR = log_count_MR[:, : point_MRK.shape[1]] > -jnp.inf
    log_tokens_M = digest.log_tokens(index.digest, log_count_MR)
    if index.span_blocks > 1:
        log_tokens_M = jnp.where(log_tokens_M > -jnp.inf, 0, -jnp.inf)

    num = member_M.shape[0] // index.chapter_bookmarks
    point_ERK, is_there_ER, log_tokens_ER = (
        x[member_M].reshape(num, -1, *x.shape[2:])
        for x in (point_MRK, is_there_MR, log_tokens_M)
    )
    weight_ER = is_there_ER / jnp.maximum(is_there_ER.sum(1, keepdims=True), 1)
    centre_EK = jnp.einsum("er,erk->ek", weight_ER, point_ERK)
    gap_ER = jnp.linalg.norm(point_ERK - centre_EK[:, None], axis=-1)
    radius_E = jnp.where(is_there_ER, gap_ER, 0).max(1)
    radius_E += ROUNDING * (radius_E + jnp.linalg.norm(centre_EK, axis=1))
    bound_TE = query_TK @ centre_EK.T
    bound_TE += jnp.linalg.norm(query_TK, axis=1, keepdims=True) * radius_E
    return bound_TE + log_tokens_ER.max(1) + ROUNDING
