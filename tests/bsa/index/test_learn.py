"""Scores with gradients: what the loss reaches through a bias, and what scores are taught."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import digest, learn
from pallas_kernels import selection
from tests.bsa.index import cases

SHAPE = B, T, H, G, K = 2, 40, 4, 2, 8
WEIGHT = 0.7


def drawn(index):
    """Queries, keys, and the view of rows of two documents."""
    q_BTHK, k_BSGK = cases.queries_and_keys(0, SHAPE, index, 0)
    position_BT = cases.positions(jax.random.key(1), B, T, 1)
    return q_BTHK, k_BSGK, cases.window_view(position_BT, 8, index)


def test_bias_is_the_score_of_open_blocks_and_its_gradient_stays_there():
    """One point a block: its keys share the mean query evenly, and no other key or query is moved."""
    index = dataclasses.replace(cases.BASE, R=1)
    q_BTHK, k_BSGK, view = drawn(index)
    low_BT, high_BT = view.open_blocks
    num_blocks, num_lists = T // index.C, T // index.query_block
    any_order = np.random.default_rng(0).permuted(
        np.tile(np.arange(-2, num_blocks), (B, G, num_lists, 1)), axis=-1
    )
    id_BGQJ = jnp.maximum(any_order[..., :8], -1).astype(jnp.int32)
    count_BGQ = jnp.full((B, G, num_lists), 8, jnp.int32)
    lists = selection.BlockSelection(
        id_BGQJ, count_BGQ, None, index.query_block, index.C
    )

    @jax.jit
    def bias(q_BTHK, k_BSGK):
        return learn.list_bias(
            *(q_BTHK, k_BSGK, lists, (low_BT, high_BT), index),
            scale=cases.SCALE,
            weight=WEIGHT,
        )

    id_BGTJ = np.repeat(id_BGQJ, index.query_block, axis=2)
    is_open = (id_BGTJ >= low_BT[:, None, :, None]) & (
        id_BGTJ < high_BT[:, None, :, None]
    )
    bias_BGTJ = np.asarray(bias(q_BTHK, k_BSGK))
    mean_BTGK = np.asarray(q_BTHK).reshape(B, T, G, -1, K).mean(3)
    mean_BNGK = np.asarray(k_BSGK).reshape(B, -1, index.C, G, K).mean(2)
    logit_BGTN = np.einsum("BTGK,BNGK->BGTN", mean_BTGK, mean_BNGK) * cases.SCALE
    listed = np.take_along_axis(logit_BGTN, np.maximum(id_BGTJ, 0), axis=-1)
    np.testing.assert_allclose(
        bias_BGTJ, np.where(is_open, WEIGHT * listed, 0), atol=1e-5
    )

    row, t = 1, int(np.asarray(is_open[1]).sum((0, 2)).argmax())
    pull = jax.jit(jax.grad(lambda q, k: bias(q, k)[row, :, t].sum(), argnums=(0, 1)))
    q_grad, k_grad = (np.asarray(x) for x in pull(q_BTHK, k_BSGK))
    read_TG = np.zeros((T, G), bool)
    for g in range(G):
        blocks = id_BGTJ[row, g, t][np.asarray(is_open[row, g, t])]
        read_TG[:, g] = np.isin(np.arange(T) // index.C, blocks)
    share_GK = WEIGHT * cases.SCALE / index.C * mean_BTGK[row, t]
    np.testing.assert_allclose(k_grad[row], read_TG[..., None] * share_GK, atol=1e-6)
    assert read_TG.any() and not k_grad[1 - row].any()
    moved_BT = np.abs(q_grad).max((2, 3)) > 0
    assert np.argwhere(moved_BT).tolist() == [[row, t]]


def test_blocks_have_the_mass_that_their_scores_promise():
    """With both weights 1; and their tokens share it as they would alone."""
    index = dataclasses.replace(cases.BASE, R=1)
    q_BTHK, k_BSGK, view = drawn(index)
    q_BTGK = q_BTHK[:, :, ::2]
    low_BT, high_BT = view.open_blocks
    num_blocks, num_lists = T // index.C, T // index.query_block
    id_BGQJ = jnp.tile(jnp.arange(num_blocks, dtype=jnp.int32), (B, G, num_lists, 1))
    count_BGQ = jnp.full((B, G, num_lists), num_blocks, jnp.int32)
    lists = selection.BlockSelection(
        id_BGQJ, count_BGQ, None, index.query_block, index.C
    )
    other_BSGK = k_BSGK[..., ::-1]
    bias_BGTN = learn.list_bias(
        *(q_BTGK, other_BSGK, lists, (low_BT, high_BT), index),
        scale=cases.SCALE,
        weight=1.0,
        attending=(q_BTGK, k_BSGK),
        mass_weight=1.0,
    )

    def log_mass(k_BNGCK):
        logit = np.einsum("BTGK,BNGCK->BGTNC", q_BTGK, k_BNGCK) * cases.SCALE
        return np.log(np.exp(logit).sum(-1))

    blocks, others = (
        np.asarray(x).reshape(B, num_blocks, index.C, G, K).swapaxes(2, 3)
        for x in (k_BSGK, other_BSGK)
    )
    promised = log_mass(np.broadcast_to(others.mean(3, keepdims=True), others.shape))
    block_N = np.arange(num_blocks)
    is_open = (block_N >= low_BT[..., None]) & (block_N < high_BT[..., None])
    assert is_open.any()
    expected = np.where(is_open[:, None], promised, log_mass(blocks))
    np.testing.assert_allclose(log_mass(blocks) + bias_BGTN, expected, atol=1e-5)


def test_scores_that_are_attention_diverge_from_it_by_nothing():
    """A point for each key and one head a group: scores are the logarithm of the mass. Fewer points err, and are taught."""
    q_BTHK, k_BSGK, view = drawn(cases.BASE)

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


def test_keys_are_mixed_with_those_before_them_in_their_block():
    random = np.random.default_rng(0)
    k_SGK, filter_CGK = random.normal(size=(12, G, K)), random.normal(size=(3, G, K))
    found_BSGK = learn.mix(
        jnp.asarray(k_SGK[None, 5:]),
        jnp.asarray(k_SGK[None, 3:5]),
        jnp.arange(5, 12)[None],
        jnp.asarray(filter_CGK),
        4,
    )
    for s in range(5, 12):
        said = sum(filter_CGK[i] * k_SGK[s - i] for i in range(min(s % 4 + 1, 3)))
        expected = k_SGK[s] + said / (1 + np.exp(-said))
        np.testing.assert_allclose(found_BSGK[0, s - 5], expected, rtol=1e-5, atol=1e-5)
