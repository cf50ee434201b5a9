"""Points to the means of a few clusters. Called by `digest`, for keys of a block and points of a group, and by `chapter`.

Every mean is a sum of keys, so all distances that clustering asks for follow from the inner products of a block's keys: C x C
numbers, which are read again and again, where keys have C x K and are read twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


class Clusters(NamedTuple):
    """Clusters of each block's keys.

    Attributes:
        point_BGNRK: float32, their means.
        log_count_BGNR: float32, natural log of the tokens that a point stands for: -inf for a cluster that holds none.
        quote_BGNR: int32, place in the block of the key nearest to each point; ties go to the earlier one.
        label_BGNC: int32, the cluster that each key is in.
    """

    point_BGNRK: jax.Array
    log_count_BGNR: jax.Array
    quote_BGNR: jax.Array
    label_BGNC: jax.Array


def cluster(k_BGNCK, num_points: int, lloyd_steps: int, count_BGNC=None) -> Clusters:
    """Summarises each block's keys by the means of a few clusters.

    Seeds are the key nearest the block's mean and then, one at a time, the key farthest from all seeds so far
    (Gonzalez, 1985); each Lloyd step moves a point to the mean of the keys nearest to it. Ties go to the earlier token
    and the lower point, so equal keys give one cluster and empty ones. Gradients flow through the means, not through who belongs where.

    Args:
        k_BGNCK: keys in blocks of C tokens, any floating dtype; computed in float32.
        num_points: R, at most C.
        lloyd_steps: refinements; each point's mean and count are those of the last assignment.
        count_BGNC: float32, tokens that each key stands for; None: one each. A key of none counts for nothing.
    """
    shapes.check(k_BGNCK=k_BGNCK, count_BGNC=count_BGNC)
    gram_BGNCC = _products(jax.lax.stop_gradient(k_BGNCK))
    member_BGNRC = _farthest_keys(gram_BGNCC, num_points, count_BGNC)
    for _ in range(lloyd_steps):
        label_BGNC, _ = _assign(gram_BGNCC, member_BGNRC)
        new_BGNRC = _members(label_BGNC, num_points, count_BGNC)
        is_found = new_BGNRC.sum(-1, keepdims=True) > 0
        member_BGNRC = jnp.where(is_found, new_BGNRC, member_BGNRC)
    label_BGNC, quote_BGNR = _assign(gram_BGNCC, member_BGNRC)
    count_BGNR = _members(label_BGNC, num_points, count_BGNC).sum(-1)
    total_BGNRK = jnp.einsum(
        "BGNRC,BGNCK->BGNRK", member_BGNRC, k_BGNCK.astype(jnp.float32)
    )
    point_BGNRK = total_BGNRK / member_BGNRC.sum(-1, keepdims=True)
    return Clusters(point_BGNRK, jnp.log(count_BGNR), quote_BGNR, label_BGNC)


def spread(k_BGNCK, clusters: Clusters, count_BGNC=None, spread_BGNC=None):
    """Mean square of what keys differ from the point of their cluster, a number of K each: float32[B, G, N, R].

    0 for a cluster that holds none. A key that stands for several has a spread of its own, which joins it. Arguments
    as for `cluster`, and what it returned.
    """
    shapes.check(k_BGNCK=k_BGNCK, spread_BGNC=spread_BGNC)
    k_BGNCK = k_BGNCK.astype(jnp.float32)
    num_points = clusters.point_BGNRK.shape[3]
    gaps = [
        jnp.square(k_BGNCK - clusters.point_BGNRK[:, :, :, r : r + 1]).mean(-1)
        for r in range(num_points)
    ]
    gap_BGNRC = jnp.stack(gaps, axis=3)
    if spread_BGNC is not None:
        gap_BGNRC += spread_BGNC[:, :, :, None]
    member_BGNRC = _members(clusters.label_BGNC, num_points, count_BGNC)
    return (member_BGNRC * gap_BGNRC).sum(-1) / jnp.maximum(member_BGNRC.sum(-1), 1)


def nearest(k_BGNCK, point_BGNRK):
    """int32 place in the block of the key nearest to each point, [B, G, N, R]; ties go to the earlier one."""
    shapes.check(k_BGNCK=k_BGNCK, point_BGNRK=point_BGNRK)
    k_BGNCK = jax.lax.stop_gradient(k_BGNCK).astype(jnp.float32)
    gaps = [
        jnp.square(k_BGNCK - point_BGNRK[:, :, :, r : r + 1]).sum(-1)
        for r in range(point_BGNRK.shape[3])
    ]
    return jnp.argmin(jnp.stack(gaps, axis=3), axis=-1).astype(jnp.int32)


def _products(k_BGNCK):
    """Inner products of a block's keys, [B, G, N, C, C] in float32, of keys that may have been moved together."""
    if k_BGNCK.dtype == jnp.bfloat16:
        return jnp.einsum(
            "BGNCK,BGNDK->BGNCD", k_BGNCK, k_BGNCK, preferred_element_type=jnp.float32
        )
    # Moved by the first key, so that what all keys have in common costs no bits.
    k_BGNCK = k_BGNCK.astype(jnp.float32)
    k_BGNCK -= k_BGNCK[:, :, :, :1]
    return jnp.einsum("BGNCK,BGNDK->BGNCD", k_BGNCK, k_BGNCK, precision="highest")


def _farthest_keys(gram_BGNCC, num_points, count_BGNC):
    """A key of each block for each of R clusters: the one nearest the mean, then each time the one farthest from those taken.

    Returns:
        member_BGNRC: float32, 1 for the key of each cluster.
    """
    C = gram_BGNCC.shape[-1]
    count = jnp.ones(gram_BGNCC.shape[:-1]) if count_BGNC is None else count_BGNC
    missing_BGNC = count <= 0
    own_BGNC = _own(gram_BGNCC)
    total_BGN1 = jnp.maximum(count.sum(-1, keepdims=True), 1)
    pull_BGNC = _pull(gram_BGNCC, count[:, :, :, None])[:, :, :, 0]
    gap_BGNC = total_BGN1 * own_BGNC - 2 * pull_BGNC
    pick = jnp.argmin(jnp.where(missing_BGNC, jnp.inf, gap_BGNC), axis=3)

    def take(state, _):
        pick, gap_BGNC = state
        seed_BGNC = jax.nn.one_hot(pick, C)
        pull_BGNC = _pull(gram_BGNCC, seed_BGNC[:, :, :, None])[:, :, :, 0]
        own_BGN1 = (seed_BGNC * own_BGNC).sum(-1, keepdims=True)
        gap_BGNC = jnp.minimum(gap_BGNC, own_BGNC - 2 * pull_BGNC + own_BGN1)
        pick = jnp.argmax(jnp.where(missing_BGNC, -1, gap_BGNC), axis=3)
        return (pick, gap_BGNC), seed_BGNC

    first = pick, jnp.full_like(gap_BGNC, jnp.inf)
    _, seed_RBGNC = jax.lax.scan(take, first, length=num_points, unroll=num_points <= 2)
    return jnp.moveaxis(seed_RBGNC, 0, 3)


def _own(gram_BGNCC):
    """Squares of the keys, [B, G, N, C]; summed as `_pull` sums, since GPUs gather a diagonal more slowly."""
    return (gram_BGNCC * jnp.eye(gram_BGNCC.shape[-1])).sum(-2)


def _pull(gram_BGNCC, member_BGNRC):
    """Inner products of each key with the sum of a cluster's members, [B, G, N, R, C].

    Sums over rows: GPUs read columns side by side, and products are the same either way round.
    """
    return (gram_BGNCC[:, :, :, None] * member_BGNRC[..., None]).sum(-2)


def _assign(gram_BGNCC, member_BGNRC):
    """The cluster whose mean is nearest to each key, int32 [B, G, N, C], and the key nearest to each mean, [B, G, N, R]."""
    total_BGNR1 = member_BGNRC.sum(-1, keepdims=True)
    pull_BGNRC = _pull(gram_BGNCC, member_BGNRC) / total_BGNR1
    square_BGNR1 = (member_BGNRC * pull_BGNRC).sum(-1, keepdims=True) / total_BGNR1
    label_BGNC = jnp.argmax(pull_BGNRC - 0.5 * square_BGNR1, axis=3)
    away_BGNRC = _own(gram_BGNCC)[:, :, :, None] - 2 * pull_BGNRC
    quote_BGNR = jnp.argmin(away_BGNRC, axis=-1)
    return label_BGNC.astype(jnp.int32), quote_BGNR.astype(jnp.int32)


def _members(label_BGNC, num_points, count_BGNC):
    """Tokens of each key in each of R clusters: float32 [B, G, N, R, C]."""
    place_R1 = jnp.arange(num_points)[:, None]
    count = jnp.ones(()) if count_BGNC is None else count_BGNC[:, :, :, None]
    return (label_BGNC[:, :, :, None] == place_R1) * count
