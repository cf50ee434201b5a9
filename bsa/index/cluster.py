"""Points to the means of a few clusters. Called by `digest`, for keys of a block and points of a group, and by `chapter`."""

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


def cluster(k_BGNCK, num_points: int, lloyd_steps: int, count_BGNC=None):
    """Summarises each block's keys by the means of a few clusters.

    Seeds are the key nearest the block's mean and then, one at a time, the key farthest from all seeds so far
    (Gonzalez, 1985); each Lloyd step moves a point to the mean of the keys nearest to it. Ties go to the earlier token
    and the lower point, so equal keys give one cluster and empty ones. Gradients flow through the means, not through who belongs where.

    Args:
        k_BGNCK: keys in blocks of C tokens, any floating dtype; computed in float32.
        num_points: R, at most C.
        lloyd_steps: refinements; each point's mean and count are those of the last assignment.
        count_BGNC: float32, tokens that each key stands for; None: one each. A key of none counts for nothing.
    Returns:
        point_BGNRK in float32, and log_count_BGNR in float32, natural log of the tokens that a point stands for:
        -inf for a cluster that holds none.
    """
    shapes.check(k_BGNCK=k_BGNCK, count_BGNC=count_BGNC)
    k_BGNCK = k_BGNCK.astype(jnp.float32)
    point_BGNRK = _farthest_keys(k_BGNCK, num_points, count_BGNC)
    for _ in range(lloyd_steps):
        mean_BGNRK, count_BGNR = _cluster_means(k_BGNCK, point_BGNRK, count_BGNC)
        point_BGNRK = jnp.where(count_BGNR[..., None] > 0, mean_BGNRK, point_BGNRK)
    _, count_BGNR = _cluster_means(k_BGNCK, point_BGNRK, count_BGNC)
    return point_BGNRK, jnp.log(count_BGNR)


def spread(k_BGNCK, point_BGNRK, count_BGNC=None, spread_BGNC=None):
    """Mean square of what keys differ from the point nearest to them, a number of K each: float32[B, G, N, R].

    0 for a point that is nearest to none. A key that stands for several has a spread of its own, which joins it. Arguments
    as for `cluster`; points as it returns them.
    """
    shapes.check(k_BGNCK=k_BGNCK, point_BGNRK=point_BGNRK, spread_BGNC=spread_BGNC)
    k_BGNCK = k_BGNCK.astype(jnp.float32)
    member_BGNCR = _members(k_BGNCK, point_BGNRK, count_BGNC)
    gaps = [
        jnp.square(k_BGNCK - point_BGNRK[:, :, :, r : r + 1]).mean(-1)
        for r in range(point_BGNRK.shape[3])
    ]
    gap_BGNCR = jnp.stack(gaps, axis=-1)
    if spread_BGNC is not None:
        gap_BGNCR += spread_BGNC[..., None]
    return (member_BGNCR * gap_BGNCR).sum(3) / jnp.maximum(member_BGNCR.sum(3), 1)


def label(k_BGNCK, num_points: int, lloyd_steps: int, count_BGNC):
    """int32 cluster that each key is in, [B, G, N, C]; arguments as for `cluster`."""
    point_BGNRK, _ = cluster(k_BGNCK, num_points, lloyd_steps, count_BGNC)
    gaps = [
        _squared_distance(k_BGNCK, point_BGNRK[:, :, :, r : r + 1])
        for r in range(num_points)
    ]
    return jnp.argmin(jnp.stack(gaps, axis=-1), axis=-1).astype(jnp.int32)


def nearest(k_BGNCK, point_BGNRK):
    """int32 place in the block of the key nearest to each point, [B, G, N, R]; ties go to the earlier one."""
    shapes.check(k_BGNCK=k_BGNCK, point_BGNRK=point_BGNRK)
    k_BGNCK = jax.lax.stop_gradient(k_BGNCK).astype(jnp.float32)
    gaps = [
        _squared_distance(k_BGNCK, point_BGNRK[:, :, :, r : r + 1])
        for r in range(point_BGNRK.shape[3])
    ]
    return jnp.argmin(jnp.stack(gaps, axis=3), axis=-1).astype(jnp.int32)


def _farthest_keys(k_BGNCK, num_points, count_BGNC):
    """R keys of each block: the one nearest the mean, then each time the one farthest from those taken."""
    if count_BGNC is None:
        mean_BGN1K = k_BGNCK.mean(3, keepdims=True)
        missing_BGNC = False
    else:
        total_BGN = jnp.maximum(count_BGNC.sum(3), 1)[..., None, None]
        mean_BGN1K = (k_BGNCK * count_BGNC[..., None]).sum(3, keepdims=True) / total_BGN
        missing_BGNC = count_BGNC <= 0
    gap_BGNC = _squared_distance(k_BGNCK, mean_BGN1K)
    pick = jnp.argmin(jnp.where(missing_BGNC, jnp.inf, gap_BGNC), axis=3)
    seeds, gap_BGNC = [], jnp.inf
    for _ in range(num_points):
        seed_BGN1K = jnp.take_along_axis(k_BGNCK, pick[..., None, None], axis=3)
        seeds.append(seed_BGN1K)
        gap_BGNC = jnp.minimum(gap_BGNC, _squared_distance(k_BGNCK, seed_BGN1K))
        pick = jnp.argmax(jnp.where(missing_BGNC, -1, gap_BGNC), axis=3)
    return jnp.concatenate(seeds, axis=3)


def _squared_distance(k_BGNCK, point_BGN1K):
    return jnp.square(k_BGNCK - point_BGN1K).sum(-1)


def _members(k_BGNCK, point_BGNRK, count_BGNC):
    """float32 [B, G, N, C, R], tokens of each key at the point nearest to it, 0 elsewhere."""
    affinity_BGNCR = jnp.einsum("BGNCK,BGNRK->BGNCR", k_BGNCK, point_BGNRK)
    affinity_BGNCR -= 0.5 * jnp.square(point_BGNRK).sum(-1)[:, :, :, None]
    member_BGNCR = jax.nn.one_hot(
        jnp.argmax(affinity_BGNCR, axis=-1), point_BGNRK.shape[3], dtype=jnp.float32
    )
    return member_BGNCR if count_BGNC is None else member_BGNCR * count_BGNC[..., None]


def _cluster_means(k_BGNCK, point_BGNRK, count_BGNC):
    """Means and counts of the keys nearest to each point; 0 and 0 for a point nearest to none."""
    member_BGNCR = _members(k_BGNCK, point_BGNRK, count_BGNC)
    count_BGNR = member_BGNCR.sum(3)
    total_BGNRK = jnp.einsum("BGNCR,BGNCK->BGNRK", member_BGNCR, k_BGNCK)
    return total_BGNRK / jnp.maximum(count_BGNR, 1)[..., None], count_BGNR
