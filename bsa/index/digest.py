"""What a bookmark keeps of its span, and how a query judges it by that. Called by `build`, `chapter`, `span`, `link`, `route`.

Six digests, each R vectors with counts. `clusters`, `submeans` and `distinctive` are mixtures of points: the score is
the attention mass the span would get if each key were its point. `spread` are clusters whose vectors end with one number
more, the mean square of what keys differ from their point: the mass of Gaussians that are as wide in all directions, which
is an inner product with half the query's square at the end. `minmax` is the channels' greatest and least value,
whose score bounds every logit from above (Quest, arXiv 2406.10774). `meanvar` is the mean and the channels' variance;
its score is the mass of a Gaussian with these moments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import cluster, settings
from pallas_kernels import shapes

FEW_QUERIES = 8
"""Of one token's heads: points are then compared as they lie, not laid out anew."""


def summarise(k_BGNCK, index: settings.IndexSettings):
    """Digests each block of keys; what is kept of them has gradients.

    Returns:
        point_BGNRK: float32; K is one more than the keys' for `spread`.
        log_count_BGNR: float32, natural log of the tokens that a point stands for, -inf for none; all C for each of the
            two vectors of `minmax` and `meanvar`.
        quote_BGNR: int32, place in the block of the token nearest to each point; -1 where the point stands for no token
            or, as a variance, is no place.
    """
    shapes.check(k_BGNCK=k_BGNCK)
    if index.digest in ("clusters", "spread"):
        clusters = cluster.cluster(k_BGNCK, index.R, index.lloyd_steps)
        point, log_count, quote, _ = clusters
        if index.digest == "spread":
            point = _append(point, cluster.spread(k_BGNCK, clusters))
        return point, log_count, jnp.where(log_count > -jnp.inf, quote, -1)
    k_BGNCK = k_BGNCK.astype(jnp.float32)
    if index.digest == "submeans":
        point, log_count = _submeans(k_BGNCK, index.R)
    elif index.digest == "distinctive":
        point, log_count = _distinctive(k_BGNCK, index.R)
    else:
        if index.digest == "minmax":
            ends = [k_BGNCK.max(3), k_BGNCK.min(3)]
        else:
            ends = [k_BGNCK.mean(3), k_BGNCK.var(3)]
        point = jnp.stack(ends, axis=3)
        log_count = jnp.full(point.shape[:4], np.log(k_BGNCK.shape[3]), jnp.float32)
    quote = cluster.nearest(k_BGNCK, point)
    return point, log_count, jnp.where(is_place(index.digest, log_count), quote, -1)


def is_place(digest: str, log_count):
    """Whether a vector of a digest is a place in key space that stands for tokens, as a variance is not."""
    stands = log_count > -jnp.inf
    return stands & (jnp.arange(2) == 0) if digest == "meanvar" else stands


def aggregate(
    point_BGNCK, log_count_BGNC, num_points: int, index: settings.IndexSettings
):
    """Digests groups of digests in the same way; a member's R points stand one after another along C.

    Mixtures become clusters of the members' points, weighted by count. Bounds and moments are exact: those of all the
    group's keys. Members of no token count for nothing; a group of none but these is one.

    Returns:
        point_BGNRK and log_count_BGNR as `summarise` has them, R = `num_points`.
    """
    shapes.check(point_BGNCK=point_BGNCK, log_count_BGNC=log_count_BGNC)
    if index.digest not in ("minmax", "meanvar"):
        place_BGNCK, count_BGNC = places(index.digest, point_BGNCK, log_count_BGNC)
        clusters = cluster.cluster(
            place_BGNCK, num_points, index.lloyd_steps, count_BGNC
        )
        point, log_count = clusters[:2]
        if index.digest == "spread":
            own_BGNC = point_BGNCK[..., -1]
            spread = cluster.spread(place_BGNCK, clusters, count_BGNC, own_BGNC)
            point = _append(point, spread)
        return point, log_count
    first, second = point_BGNCK[:, :, :, ::2], point_BGNCK[:, :, :, 1::2]
    log_count = log_count_BGNC[:, :, :, ::2]
    total_BGN1 = jax.nn.logsumexp(log_count, axis=-1, keepdims=True)
    is_there = log_count[..., None] > -jnp.inf
    if index.digest == "minmax":
        ends = [
            first.max(3, initial=-jnp.inf, where=is_there),
            second.min(3, initial=jnp.inf, where=is_there),
        ]
    else:
        share = jnp.exp(log_count - total_BGN1)[..., None]
        mean = (share * first).sum(3)
        spread = second + jnp.square(first - mean[:, :, :, None])
        ends = [mean, (share * spread).sum(3)]
    is_empty = total_BGN1[..., None] == -jnp.inf
    return jnp.where(is_empty, 0, jnp.stack(ends, axis=3)), jnp.tile(total_BGN1, 2)


def score(digest: str, q_HK, point_MRK, log_count_MR, point_pool: str = "logsumexp"):
    """Log of the attention mass that each query expects of each bookmark, or a bound of it: float32[H, M], nats.

    Args:
        digest: one of `settings.DIGESTS`.
        q_HK: float32 queries, times the attention's scale, as `widen` makes them.
        point_pool: "max": what the best point of a mixture promises alone, at most log(R) less.
    """
    shapes.check(q_HK=q_HK, point_MRK=point_MRK, log_count_MR=log_count_MR)
    if digest in ("minmax", "meanvar"):
        logit_HM = lift(digest, q_HK) @ point_MRK.reshape(point_MRK.shape[0], -1).T
        return logit_HM + log_count_MR[:, 0]
    if q_HK.shape[0] <= FEW_QUERIES:
        M, R, K = point_MRK.shape
        logit_MRH = (point_MRK.reshape(M * R, K) @ q_HK.T).reshape(M, R, -1)
        logits = jnp.unstack(logit_MRH + log_count_MR[..., None], axis=1)
        logits = [logit_MH.T for logit_MH in logits]
    else:
        logit_HRM = jnp.einsum("hk,rmk->hrm", q_HK, point_MRK.swapaxes(0, 1))
        logits = jnp.unstack(logit_HRM + log_count_MR.T, axis=1)
    if point_pool == "max":
        return functools.reduce(jnp.maximum, logits)
    return _log_sum(logits)


def widen(digest: str, q):
    """Queries along the last axis with what `spread` multiplies with spreads at the end, others as they are.

    To be done before heads are pooled: the mean of these makes the mean of the heads' products, which the mean query's
    square would not.
    """
    return _append(q, 0.5 * jnp.square(q).sum(-1)) if digest == "spread" else q


def lift(digest: str, q_HK):
    """What is multiplied with the vectors of a digest: one by one if it is a mixture, else end to end, R x K numbers."""
    if digest == "minmax":
        return jnp.concatenate([jnp.maximum(q_HK, 0), jnp.minimum(q_HK, 0)], axis=1)
    if digest == "meanvar":
        return jnp.concatenate([q_HK, 0.5 * jnp.square(q_HK)], axis=1)
    return q_HK


def _log_sum(logits):
    """`logsumexp` of a few arrays, elementwise: XLA reads them once, and joins this with what comes after."""
    largest = functools.reduce(jnp.maximum, logits)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return jnp.log(sum(jnp.exp(x - largest) for x in logits)) + largest


def log_tokens(digest: str, log_count):
    """Natural log of the tokens that digests stand for, of counts [..., R]; -inf for none."""
    if digest in ("minmax", "meanvar"):
        return log_count[..., 0]
    return jax.nn.logsumexp(log_count, axis=-1)


def places(digest: str, point, log_count):
    """Where in key space digests lie: the points of a mixture, else one centre.

    Args:
        point, log_count: [..., R, K] and [..., R].
    Returns:
        The places, and the tokens at each, 0 for a point that stands for none.
    """
    if digest == "minmax":
        return point.mean(-2, keepdims=True), jnp.exp(log_count[..., :1])
    if digest == "meanvar":
        return point[..., :1, :], jnp.exp(log_count[..., :1])
    if digest == "spread":
        point = point[..., :-1]
    return point, jnp.exp(log_count)


def centre(digest: str, point, log_count):
    """Mean of a digest's places, [..., K]; NaN for one that stands for no token."""
    place, count = places(digest, point, log_count)
    return (place * count[..., None]).sum(-2) / count.sum(-1, keepdims=True)


def direction(place, similarity: str):
    """Vectors along the last axis whose inner products are their similarity, one of `settings.SIMILARITIES`.

    They are as they are for "dot"; of length 1 for "cosine"; for "pearson" after their mean was taken off.
    """
    if similarity == "pearson":
        place -= place.mean(-1, keepdims=True)
    if similarity == "dot":
        return place
    length = jnp.sqrt(jnp.square(place).sum(-1, keepdims=True))
    return place / jnp.maximum(length, 1e-20)


def _append(vector, number):
    """Vectors with one number more at the end."""
    return jnp.concatenate([vector, number[..., None]], axis=-1)


def _submeans(k_BGNCK, num_points):
    """Means of R contiguous pieces, as even as C allows, the longer ones first."""
    pieces = jnp.array_split(k_BGNCK, num_points, axis=3)
    point = jnp.stack([piece.mean(3) for piece in pieces], axis=3)
    log_count = np.log([piece.shape[3] for piece in pieces]).astype(np.float32)
    return point, jnp.broadcast_to(log_count, point.shape[:4])


def _distinctive(k_BGNCK, num_points):
    """The mean of the rest, then the R-1 keys farthest from the block's mean, farthest first."""
    gap_BGNC = jnp.square(k_BGNCK - k_BGNCK.mean(3, keepdims=True)).sum(-1)
    _, pick = jax.lax.top_k(gap_BGNC, num_points - 1)
    kept = jnp.take_along_axis(k_BGNCK, pick[..., None], axis=3)
    num_tokens = k_BGNCK.shape[3]
    rest_BGNC = (pick[..., None] != jnp.arange(num_tokens)).all(3)
    num_rest = num_tokens - num_points + 1
    rest = (k_BGNCK * rest_BGNC[..., None]).sum(3, keepdims=True) / num_rest
    point = jnp.concatenate([rest, kept], axis=3)
    count = np.array([num_rest] + [1] * (num_points - 1), np.float32)
    return point, jnp.broadcast_to(np.log(count), point.shape[:4])
