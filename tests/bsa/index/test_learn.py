"""Scores with gradients: what the loss reaches through a bias, and what scores are taught."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import build, digest, learn, route, unite
from tests.bsa.index import cases

SHAPE = B, T, H, G, K = 2, 40, 4, 2, 8
WEIGHT = 0.7


def drawn(index):
    """Queries, keys, the view and the lists of rows of two documents."""
    q_BTHK, k_BSGK = cases.queries_and_keys(0, SHAPE, index, 0)
    view = cases.window_view(cases.positions(jax.random.key(1), B, T, 1), 8, index)
    bookmarks = build.build_index(k_BSGK, index, view.start_BT)
    choice = route.choose_blocks(
        q_BTHK, k_BSGK, bookmarks, view, index, scale=cases.SCALE
    )
    lists, _ = unite.unite(choice, view, index, G)
    return q_BTHK, k_BSGK, view, bookmarks, lists


def test_bias_is_the_score_of_chosen_blocks_and_its_gradient_stays_there():
    """One point a block: a chosen block's keys share the mean query evenly, and no other key or query is moved."""
    index = dataclasses.replace(cases.BASE, R=1)
    q_BTHK, k_BSGK, view, bookmarks, lists = drawn(index)
    low_BT, high_BT = view.open_blocks

    @jax.jit
    def bias(q_BTHK, k_BSGK):
        return learn.list_bias(
            *(q_BTHK, k_BSGK, lists, (low_BT, high_BT), index),
            scale=cases.SCALE,
            weight=WEIGHT,
        )

    bias_BGTJ, pull = jax.vjp(bias, q_BTHK, k_BSGK)
    id_BGTJ = jnp.repeat(lists.block_id_BGQJ, index.query_block, axis=2)
    is_chosen = (id_BGTJ >= low_BT[:, None, :, None]) & (
        id_BGTJ < high_BT[:, None, :, None]
    )
    assert is_chosen.any() and not is_chosen.all()
    mean_BTGK = q_BTHK.reshape(B, T, G, -1, K).mean(3)
    point_BGMK = bookmarks.point_BGMRK[:, :, :, 0]
    logit_BGTM = jnp.einsum("BTGK,BGMK->BGTM", mean_BTGK, point_BGMK) * cases.SCALE
    listed = jnp.take_along_axis(logit_BGTM, jnp.maximum(id_BGTJ, 0), axis=-1)
    expected = jnp.where(is_chosen, WEIGHT * listed, 0)
    np.testing.assert_allclose(bias_BGTJ, expected, atol=1e-5)

    for row in range(B):
        t = int(is_chosen[row].sum((0, 2)).argmax())
        one = jnp.zeros_like(bias_BGTJ).at[row, :, t].set(1.0)
        q_grad, k_grad = pull(one)
        read = np.zeros((B, T, G), np.float32)
        for g in range(G):
            for n in np.asarray(id_BGTJ[row, g, t])[np.asarray(is_chosen[row, g, t])]:
                read[row, n * index.C : (n + 1) * index.C, g] = 1
        share = WEIGHT * cases.SCALE / index.C * mean_BTGK[row, t]
        np.testing.assert_allclose(k_grad, read[..., None] * share, atol=1e-6)
        moved = np.abs(np.asarray(q_grad)).max((2, 3)) > 0
        assert np.argwhere(moved).tolist() == [[row, t]]


def test_scores_that_are_attention_diverge_from_it_by_nothing():
    """A point for each key and one head a group: scores are the logarithm of the mass. Fewer points err, and are taught."""
    q_BTHK, k_BSGK, view, *_ = drawn(cases.BASE)

    @jax.jit
    @jax.value_and_grad
    def divergence(q_BTHK, num_points):
        return learn.divergence(
            *[(q_BTHK[:, :, ::2], k_BSGK)] * 2,
            *(view.start_BT, view.open_blocks),
            dataclasses.replace(cases.BASE, R=num_points.shape[0]),
            scale=cases.SCALE,
            num_rows=T,
        )

    exact, gradient = divergence(q_BTHK, jnp.zeros(cases.BASE.C))
    assert abs(exact) < 1e-5 and np.abs(gradient).max() < 1e-5
    rough, gradient = divergence(q_BTHK, jnp.zeros(1))
    assert rough > 0.01
    chooses = np.asarray(view.open_blocks[1] - view.open_blocks[0]) > 1
    moved = np.abs(np.asarray(gradient)).max((2, 3)) > 1e-6
    np.testing.assert_array_equal(moved, chooses)


def test_gradients_of_empty_clusters_are_finite():
    """Those of blocks whose keys are all equal."""
    index = dataclasses.replace(cases.BASE, R=3)
    q_HK = jax.random.normal(jax.random.key(2), (H, K))

    @jax.jit
    @jax.grad
    def gradient(k_BGNCK):
        point, log_count, _ = digest.summarise(k_BGNCK, index)
        return digest.score(index.digest, q_HK, point[0, 0], log_count[0, 0]).sum()

    k_grad = np.asarray(gradient(jnp.ones((1, 1, 2, index.C, K))))
    np.testing.assert_allclose(k_grad.sum((0, 1, 3)), [q_HK.sum(0)] * 2, rtol=1e-5)
