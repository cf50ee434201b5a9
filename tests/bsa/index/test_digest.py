"""Digests equal the NumPy loops, and promise what their names say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.index import build, digest, reference_digest
from bsa.index.settings import DIGESTS
from tests.bsa.index import cases

summarise = jax.jit(digest.summarise, static_argnums=1)
aggregate = jax.jit(digest.aggregate, static_argnums=(2, 3))
MIXTURES = ("clusters", "spread", "submeans", "distinctive")
KINDS = [
    *((kind, R) for kind in MIXTURES for R in (1, 3, 8)),
    ("minmax", 2),
    ("meanvar", 2),
]


def settings(kind, R, **change):
    return dataclasses.replace(
        cases.BASE, digest=kind, C=8, sink_tokens=8, R=R, **change
    )


def random_keys(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kind, R", KINDS)
def test_digests(kind, R):
    index = settings(kind, R)
    k_BGNCK = random_keys(R, 2, 2, 3, 8, 5)
    k_BGNCK = k_BGNCK.at[:, :, 1, 4:].set(k_BGNCK[:, :, 1, :4])  # ties
    point_BGNRK, log_count_BGNR, quote_BGNR = summarise(k_BGNCK, index)
    q_HK = random_keys(7, 3, 5)
    for b, g in np.ndindex(2, 2):
        score_HN = digest.score(
            kind, digest.widen(kind, q_HK), point_BGNRK[b, g], log_count_BGNR[b, g]
        )
        for n in range(3):
            point_RK, count_R, quotes = reference_digest.summarise(
                k_BGNCK[b, g, n], index
            )
            found_RK, quote_R = point_BGNRK[b, g, n], quote_BGNR[b, g, n]
            cases.check_digest(found_RK, log_count_BGNR[b, g, n], point_RK, count_R)
            cases.check_quotes(quote_R, found_RK[:, :5], k_BGNCK[b, g, n])
            assert sorted(quote_R < 0) == sorted(np.array(quotes) < 0)
            assert n != 1 or (quote_R < 4).all(), "ties go to the earlier token"
            for h in range(3):
                wide_K = reference_digest.widen(kind, np.asarray(q_HK[h]))
                expected = reference_digest.score(kind, wide_K, point_RK, count_R)
                np.testing.assert_allclose(score_HN[h, n], expected, atol=1e-4)


@pytest.mark.parametrize("kind, R", KINDS)
def test_aggregates(kind, R):
    index = settings(kind, R, chapter_R=2)
    k_BGNCK = random_keys(R, 1, 2, 6, 8, 5)
    k_BGNCK = k_BGNCK.at[:, :, 1].set(1.0)  # one cluster and empty ones
    point, log_count, _ = summarise(k_BGNCK, index)
    joined, log_joined = aggregate(
        point.reshape(1, 2, 2, -1, point.shape[-1]),
        log_count.reshape(1, 2, 2, -1),
        2,
        index,
    )
    for g, e in np.ndindex(2, 2):
        members = [
            reference_digest.summarise(k_BGNCK[0, g, n], index)[:2]
            for n in range(3 * e, 3 * e + 3)
        ]
        point_RK, count_R = reference_digest.aggregate(members, 2, index)
        cases.check_digest(joined[0, g, e], log_joined[0, g, e], point_RK, count_R)


@pytest.mark.parametrize("kind", ["minmax", "meanvar"])
def test_bounds_and_moments_of_chapters_are_those_of_their_keys(kind):
    index = settings(kind, 2)
    k_BGNCK = random_keys(1, 1, 1, 6, 8, 5)
    point, log_count, _ = summarise(k_BGNCK, index)
    joined = aggregate(
        point.reshape(1, 1, 2, 6, 5), log_count.reshape(1, 1, 2, 6), 2, index
    )
    whole = summarise(k_BGNCK.reshape(1, 1, 2, 24, 5), index)[:2]
    for ours, theirs in zip(joined, whole):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_minmax_bounds_the_mass():
    k_BGNCK, q_HK = random_keys(2, 1, 1, 9, 8, 5), random_keys(3, 4, 5)
    point, log_count, _ = summarise(k_BGNCK, settings("minmax", 2))
    bound_HN = digest.score("minmax", q_HK, point[0, 0], log_count[0, 0])
    logit_HNC = jnp.einsum("hk,nck->hnc", q_HK, k_BGNCK[0, 0])
    assert (bound_HN >= jax.nn.logsumexp(logit_HNC, axis=-1) - 1e-5).all()


@pytest.mark.parametrize("kind", MIXTURES)
def test_as_many_points_as_tokens_are_exact(kind):
    k_BGNCK, q_HK = random_keys(4, 1, 1, 3, 8, 5), random_keys(5, 2, 5)
    point, log_count, _ = summarise(k_BGNCK, settings(kind, 8))
    wide_HK = digest.widen(kind, q_HK)
    score_HN = digest.score(kind, wide_HK, point[0, 0], log_count[0, 0])
    logit_HNC = jnp.einsum("hk,nck->hnc", q_HK, k_BGNCK[0, 0])
    np.testing.assert_allclose(score_HN, jax.nn.logsumexp(logit_HNC, -1), rtol=1e-5)


def test_equal_keys_make_one_cluster():
    point, log_count, quote = summarise(
        jnp.ones((1, 1, 1, 8, 3)), settings("clusters", 4)
    )
    np.testing.assert_allclose(point[0, 0, 0, 0], 1)
    np.testing.assert_array_equal(np.exp(log_count[0, 0, 0]), [8, 0, 0, 0])
    np.testing.assert_array_equal(quote[0, 0, 0], [0, -1, -1, -1])


@pytest.mark.parametrize("kind", DIGESTS)
def test_no_gradient_flows_through_an_index(kind):
    """Digests have gradients, by which they are taught; the index that is searched has none."""
    index = settings(kind, 2)

    def total(k_BSGK):
        return build.build_index(k_BSGK, index).point_BGMRK.sum()

    assert not jax.grad(total)(random_keys(6, 1, 2 * index.C, 2, 3)).any()
