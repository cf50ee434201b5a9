"""Digests in plain NumPy loops: the oracle of `digest` and `cluster`. Called by `reference` and by tests.

A digest here is a pair: point_RK and count_R, the tokens that each point stands for.
"""

import jax.numpy as jnp
import numpy as np

from bsa.index import settings


def cluster(k_CK, num_points: int, lloyd_steps: int, count_C=None):
    """Points and counts of one block; see `cluster.cluster`."""
    k_CK = np.asarray(k_CK, np.float64)
    count_C = np.ones(len(k_CK)) if count_C is None else np.asarray(count_C)
    real = np.flatnonzero(count_C)

    def distances(point_K):
        return np.square(k_CK - point_K).sum(-1)

    def mean(members):
        return np.average(k_CK[members], axis=0, weights=count_C[members])

    points = [k_CK[real[np.argmin(distances(mean(real))[real])]]]
    while len(points) < num_points:
        gap_C = np.min([distances(p) for p in points], axis=0)
        points.append(k_CK[real[np.argmax(gap_C[real])]])

    def members():
        nearest_C = np.argmin([distances(p) for p in points], axis=0)
        return [real[nearest_C[real] == r] for r in range(num_points)]

    for _ in range(lloyd_steps):
        points = [mean(m) if len(m) else p for m, p in zip(members(), points)]
    return np.stack(points), np.array([count_C[m].sum() for m in members()])


def spread(k_CK, point_RK, count_C=None, spread_C=0):
    """Points, each with the spread of the keys nearest to it at the end; see `cluster.spread`."""
    k_CK, count_C = np.asarray(k_CK), np.ones(len(k_CK)) if count_C is None else count_C
    gap_RC = np.square(k_CK - point_RK[:, None]).mean(-1) + spread_C
    nearest_C = np.argmin(np.square(k_CK - point_RK[:, None]).sum(-1), axis=0)
    ends = []
    for r, gap_C in enumerate(gap_RC):
        weight_C = count_C * (nearest_C == r)
        ends.append((weight_C * gap_C).sum() / max(weight_C.sum(), 1))
    return np.column_stack([point_RK, ends])


def summarise(k_CK, index: settings.IndexSettings):
    """A block's digest, and its quotes: places in the block, -1 for none; see `digest.summarise`."""
    k_CK = np.asarray(k_CK, np.float64)
    C = len(k_CK)
    if index.digest in ("clusters", "spread"):
        point_RK, count_R = cluster(k_CK, index.R, index.lloyd_steps)
    elif index.digest == "submeans":
        pieces = np.array_split(k_CK, index.R)
        point_RK = np.stack([piece.mean(0) for piece in pieces])
        count_R = np.array([len(piece) for piece in pieces])
    elif index.digest == "distinctive":
        gap_C = np.square(k_CK - k_CK.mean(0)).sum(-1)
        kept = np.argsort(-gap_C, kind="stable")[: index.R - 1]
        rest = [c for c in range(C) if c not in kept]
        point_RK = np.stack([k_CK[rest].mean(0), *k_CK[kept]])
        count_R = np.array([len(rest)] + [1] * len(kept))
    elif index.digest == "minmax":
        point_RK, count_R = np.stack([k_CK.max(0), k_CK.min(0)]), np.array([C, C])
    else:
        point_RK, count_R = np.stack([k_CK.mean(0), k_CK.var(0)]), np.array([C, C])
    quotes = []
    for r, (point_K, count) in enumerate(zip(point_RK, count_R)):
        is_place = count and not (index.digest == "meanvar" and r == 1)
        nearest = np.argmin(np.square(k_CK - point_K).sum(-1))
        quotes.append(int(nearest) if is_place else -1)
    if index.digest == "spread":
        point_RK = spread(k_CK, point_RK)
    return point_RK, count_R, quotes


def keep(point_RK, store: str):
    """Points after they were kept, or rounded; see `precision.pack` and `precision.round_point`."""
    point_RK = np.asarray(point_RK, np.float32)
    if store == "int8":
        scale_R1 = np.abs(point_RK).max(-1, keepdims=True) / np.float32(127)
        return np.round(point_RK / np.maximum(scale_R1, 1e-30)) * scale_R1
    if store == "float8":
        point_RK, store = np.clip(point_RK, -448, 448), jnp.float8_e4m3fn
    return point_RK.astype(jnp.dtype(store)).astype(np.float64)


def rounded(q_HK, point_RK, index: settings.IndexSettings, level: int):
    """Queries and points of a level as they are compared; see `precision.compared`."""
    if level and index.chapter_store == "float8":
        return _round_to_float8(q_HK), keep(point_RK, "float8")
    if index.store == "bfloat16":
        return keep(q_HK, "bfloat16"), keep(point_RK, "bfloat16")
    return q_HK, point_RK


def _round_to_float8(q_HK):
    """Each query times a power of two that brings it near the largest number."""
    _, exponent_H1 = np.frexp(
        np.abs(np.asarray(q_HK, np.float32)).max(-1, keepdims=True)
    )
    scale_H1 = np.ldexp(1.0, exponent_H1 - 8)
    return keep(q_HK / scale_H1, "float8") * scale_H1


def aggregate(digests, num_points: int, index: settings.IndexSettings):
    """The digest of a group of digests; see `digest.aggregate`."""
    width = digests[0][0].shape[1]
    digests = [digest for digest in digests if digest[1].any()]
    if not digests:
        return np.zeros((num_points, width)), np.zeros(num_points)
    points = np.stack([point_RK for point_RK, _ in digests])
    counts = np.stack([count_R for _, count_R in digests])
    if index.digest == "minmax":
        ends = [points[:, 0].max(0), points[:, 1].min(0)]
    elif index.digest == "meanvar":
        mean = np.average(points[:, 0], axis=0, weights=counts[:, 0])
        square = points[:, 1] + np.square(points[:, 0] - mean)
        ends = [mean, np.average(square, axis=0, weights=counts[:, 0])]
    else:
        points, count_C, spread_C = np.concatenate(points), np.concatenate(counts), 0
        if index.digest == "spread":
            points, spread_C = points[:, :-1], points[:, -1]
        made = cluster(points, num_points, index.lloyd_steps, count_C)
        if index.digest != "spread":
            return made
        return spread(points, made[0], count_C, spread_C), made[1]
    return np.stack(ends), np.full(2, counts[:, 0].sum())


def widen(kind: str, q_K):
    """See `digest.widen`."""
    return np.append(q_K, q_K @ q_K / 2) if kind == "spread" else q_K


def score(kind: str, q_K, point_RK, count_R, point_pool="logsumexp") -> float:
    """Log of the mass that a widened query expects of a bookmark; see `digest.score`."""
    if kind == "minmax":
        bound = sum(max(q * a, q * b) for q, a, b in zip(q_K, *point_RK))
        return bound + np.log(count_R[0])
    if kind == "meanvar":
        return q_K @ point_RK[0] + q_K**2 @ point_RK[1] / 2 + np.log(count_R[0])
    mass_R = count_R * np.exp(point_RK @ q_K)
    return np.log(mass_R.max() if point_pool == "max" else mass_R.sum())


def places(kind: str, point_RK, count_R):
    """The points that stand for tokens, and how many each; see `digest.places`."""
    if kind == "minmax":
        return point_RK.mean(0, keepdims=True), count_R[:1]
    if kind == "meanvar":
        return point_RK[:1], count_R[:1]
    if kind == "spread":
        point_RK = point_RK[:, :-1]
    return point_RK[count_R > 0], count_R[count_R > 0]


def centre(kind: str, point_RK, count_R):
    """Mean of the places; see `digest.centre`."""
    place, count = places(kind, point_RK, count_R)
    return np.average(place, axis=0, weights=count)


def tokens(kind: str, count_R):
    """How many a digest stands for; see `digest.log_tokens`."""
    return count_R[0] if kind in ("minmax", "meanvar") else count_R.sum()
