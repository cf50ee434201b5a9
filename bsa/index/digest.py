"""Keys of a span to the points that summarise it: cluster means with counts. Called by `build`."""

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


def cluster(k_BGNCK, num_points: int, lloyd_steps: int):
    """Summarises each block's keys by the means of a few clusters.

    Seeds are the key nearest the block's mean and then, one at a time, the key farthest from all seeds so far
    (Gonzalez, 1985); each Lloyd step moves a point to the mean of the keys nearest to it. Ties go to the earlier token
    and the lower point, so equal keys give one cluster and empty ones. No gradient flows through.

    Args:
        k_BGNCK: keys in blocks of C tokens, any floating dtype; computed in float32.
        num_points: R, at most C.
        lloyd_steps: refinements; each point's mean and count are those of the last assignment.
    Returns:
        point_BGNRK in float32, and log_count_BGNR in float32, natural log of the tokens that a point stands for:
        -inf for a cluster that holds none.
    """
    shapes.check(k_BGNCK=k_BGNCK)
    k_BGNCK = jax.lax.stop_gradient(k_BGNCK).astype(jnp.float32)
    point_BGNRK = _farthest_keys(k_BGNCK, num_points)
    for _ in range(lloyd_steps):
        mean_BGNRK, count_BGNR = _cluster_means(k_BGNCK, point_BGNRK)
        point_BGNRK = jnp.where(count_BGNR[..., None] > 0, mean_BGNRK, point_BGNRK)
    _, count_BGNR = _cluster_means(k_BGNCK, point_BGNRK)
    return point_BGNRK, jnp.log(count_BGNR)


def _farthest_keys(k_BGNCK, num_points):
    """R keys of each block: the one nearest the mean, then each time the one farthest from those taken."""
    mean_BGN1K = k_BGNCK.mean(3, keepdims=True)
    pick = jnp.argmin(_squared_distance(k_BGNCK, mean_BGN1K), axis=3)
    seeds, gap_BGNC = [], jnp.inf
    for _ in range(num_points):
        seed_BGN1K = jnp.take_along_axis(k_BGNCK, pick[..., None, None], axis=3)
        seeds.append(seed_BGN1K)
        gap_BGNC = jnp.minimum(gap_BGNC, _squared_distance(k_BGNCK, seed_BGN1K))
        pick = jnp.argmax(gap_BGNC, axis=3)
    return jnp.concatenate(seeds, axis=3)


def _squared_distance(k_BGNCK, point_BGN1K):
    return jnp.square(k_BGNCK - point_BGN1K).sum(-1)


def _cluster_means(k_BGNCK, point_BGNRK):
    """Means and counts of the keys nearest to each point; 0 and 0 for a point nearest to none."""
    affinity_BGNCR = jnp.einsum("BGNCK,BGNRK->BGNCR", k_BGNCK, point_BGNRK)
    affinity_BGNCR -= 0.5 * jnp.square(point_BGNRK).sum(-1)[:, :, :, None]
    member_BGNCR = jax.nn.one_hot(
        jnp.argmax(affinity_BGNCR, axis=-1), point_BGNRK.shape[3], dtype=jnp.float32
    )
    count_BGNR = member_BGNCR.sum(3)
    total_BGNRK = jnp.einsum("BGNCR,BGNCK->BGNRK", member_BGNCR, k_BGNCK)
    return total_BGNRK / jnp.maximum(count_BGNR, 1)[..., None], count_BGNR
