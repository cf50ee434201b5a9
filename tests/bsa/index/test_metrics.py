"""Figures of a selection, counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import metrics
from tests.bsa.index import cases


def test_bookmark_use_counts_even_and_dead_bookmarks():
    view = cases.window_view(jnp.arange(32, dtype=jnp.int32)[None], 4, cases.BASE)
    even = jnp.asarray([[[[1 + t % 6] for t in range(32)]]], jnp.int32)
    entropy, unread = metrics.bookmark_use(metrics.count_choices(even, 8), view)
    assert unread == 0 and 1.7 < entropy <= np.log(6) + 1e-6
    entropy, unread = metrics.bookmark_use(
        metrics.count_choices(jnp.ones_like(even), 8), view
    )
    assert entropy == 0 and np.isclose(unread, 5 / 6)


def test_recall_and_overlap():
    choice_BGTA = jnp.asarray([[[[3, -1], [3, 4], [5, 6], [-1, -1]]]])
    wanted_BGTA = jnp.asarray([[[[-1, -1], [4, 3], [5, 7], [2, -1]]]])
    assert np.isclose(metrics.recall(choice_BGTA, wanted_BGTA), 3 / 5)
    assert metrics.recall(choice_BGTA, jnp.full_like(choice_BGTA, -1)) == 1
    overlap = metrics.neighbour_overlap(choice_BGTA)
    assert np.isclose(overlap, (1 / 2 + 0 + 0) / 3)
    assert metrics.overlap(choice_BGTA, choice_BGTA[..., ::-1]) == 1


def test_share_scored():
    view = cases.window_view(jnp.arange(32, dtype=jnp.int32)[None], 4, cases.BASE)
    low_BT, high_BT = view.open_blocks
    every = jnp.maximum(high_BT - low_BT, 0)[:, None]
    assert metrics.share_scored(every, view) == 1
    assert metrics.share_scored(every // 2 * 0, view) == 0


def test_most_children():
    index = dataclasses.replace(cases.BASE, P=1, children=1)
    bookmarks = cases.build_index(jnp.ones((1, 40, 2, 6)), index, None)
    assert metrics.most_children(bookmarks.links) == 9, "equal keys link to the first"


def test_mass():
    B, T, H, G, K, C = 2, 32, 4, 2, 6, 4
    q_BTHK, k_BSGK = cases.queries_and_keys(1, (B, T, H, G, K), cases.BASE, 0)
    position_BT = cases.positions(jax.random.key(2), B, T, 2)
    view = cases.window_view(position_BT, 4, cases.BASE)
    token_id_T = jnp.asarray([5, 17, 30])
    start_BT = view.start_BT[:, token_id_T]
    mass_BGTN = metrics.block_mass(
        q_BTHK[:, token_id_T], k_BSGK, token_id_T, start_BT, key_block=C, scale=0.5
    )
    low_BT, high_BT = (array[:, token_id_T] for array in view.open_blocks)
    random = np.random.default_rng(3)
    choice_BGTA = np.full((B, G, 3, 2), -1)
    caught = best = seen = 0
    for b, g, i in np.ndindex(B, G, 3):
        t, start = int(token_id_T[i]), int(start_BT[b, i])
        expected_N = np.zeros(T // C)
        for h in range(2 * g, 2 * g + 2):
            weight = np.exp(0.5 * np.asarray(k_BSGK[b, :, g] @ q_BTHK[b, t, h]))
            weight[:start] = weight[t + 1 :] = 0
            expected_N += (weight / weight.sum()).reshape(-1, C).sum(1) / 2
        np.testing.assert_allclose(mass_BGTN[b, g, i], expected_N, atol=1e-5)
        blocks = range(int(low_BT[b, i]), int(high_BT[b, i]))
        chosen = random.permutation(blocks)[:2]
        choice_BGTA[b, g, i, : len(chosen)] = chosen
        caught += sum(expected_N[n] for n in chosen)
        best += sum(sorted((expected_N[n] for n in blocks), reverse=True)[:2])
        seen += sum(expected_N[n] for n in blocks)
    shares = metrics.mass_caught(mass_BGTN, jnp.asarray(choice_BGTA), low_BT, high_BT)
    np.testing.assert_allclose(
        shares, [caught / seen, best / seen, seen / (B * G * 3)], rtol=1e-4
    )
