"""Noise on scores: what is drawn, how often."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import route
from tests.bsa.index import cases

T, G, K, M, NOISE = 4096, 2, 8, 6, 0.7
INDEX = dataclasses.replace(cases.BASE, R=1, A=1, route_tokens=1024)


def test_blocks_are_drawn_by_what_they_promise():
    """Tokens that ask alike: at noise 1 in proportion to mass, below that the better ones more often; none that is shut."""
    keys = jax.random.split(jax.random.key(0), 3)
    k_BSGK = 2 * jax.random.normal(keys[0], (1, M * INDEX.C, G, K))
    q_GK = jax.random.normal(keys[1], (G, K))
    q_BTHK = jnp.broadcast_to(q_GK, (1, T, G, K))
    bookmarks = cases.build_index(k_BSGK, INDEX, None)
    open_blocks = jnp.ones((1, T), jnp.int32), jnp.full((1, T), M - 1, jnp.int32)

    @jax.jit
    def choose(seed_BGT):
        return route.search_blocks(
            *(q_BTHK, None, bookmarks, open_blocks, INDEX),
            scale=cases.SCALE,
            noise=(seed_BGT, NOISE),
        )[0]

    choice_BGTA = choose(jax.random.bits(keys[2], (1, G, T)))
    mean_MGK = k_BSGK.reshape(M, INDEX.C, G, K).mean(1)
    logit_GM = np.einsum("GK,MGK->GM", q_GK, mean_MGK) * cases.SCALE / NOISE
    share_GM = np.exp(logit_GM) * np.array([0, 1, 1, 1, 1, 0])
    share_GM /= share_GM.sum(1, keepdims=True)
    assert share_GM.max() > 0.4
    for g in range(G):
        count_M = np.bincount(np.asarray(choice_BGTA[0, g, :, 0]), minlength=M)
        np.testing.assert_allclose(count_M / T, share_GM[g], atol=0.03)
