"""Spans follow what a text is about, are ranked by what a token of theirs is worth, and are read block by block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.index import build, span, turn
from tests.bsa.index import cases

INDEX = dataclasses.replace(
    cases.BASE, C=2, sink_tokens=2, span_blocks=3, R=1, A=4, query_block=4
)


def keys_about(topics, width=8):
    """Two keys for each topic of a block: a row of one head, topics at right angles."""
    return 3 * jax.nn.one_hot(np.repeat(topics, 2), width)[None, :, None]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, [1, 2, 0, 3, 0, 0, 1, 1, 3]),
        ({"span_min_blocks": 2}, [1, 2, 0, 3, 0, 0, 2, 0, 3]),
        ({"span_min_blocks": 3}, [1, 3, 0, 0, 3, 0, 0, 3, 0]),
        ({"span_similarity": 1.1}, [1] * 9),
        (
            {"span_similarity": -1.0, "similarity": "pearson"},
            [1, 3, 0, 0, 3, 0, 0, 3, 0],
        ),
    ],
)
def test_a_span_ends_where_the_topic_does(change, expected):
    """The first block is the sink; of the last two it is not known yet."""
    index = dataclasses.replace(INDEX, **change)
    k = keys_about([0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3])
    length = cases.build_index(k, index, None).spans.length_BGM[0, 0, :9]
    assert length.tolist() == expected


def test_no_span_leaves_its_document():
    index = dataclasses.replace(INDEX, span_min_blocks=3)
    start = jnp.where(jnp.arange(24) < 9, 0, 9)[None]  # begins in the fifth block
    spans = cases.build_index(keys_about([0] * 12), index, start).spans
    assert spans.length_BGM[0, 0, :10].tolist() == [1, 3, 0, 0, 1, 3, 0, 0, 3, 0]
    assert spans.start_BM[0].tolist() == [0] * 4 + [9] * 8


def test_spans_are_ranked_by_density_and_read_block_by_block():
    """Three blocks hold more mass than one; each of their tokens holds less."""
    k = keys_about([0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4])
    q = jnp.zeros((1, 26, 1, 8)).at[..., 1].set(1.9).at[..., 2].set(2.0)
    view = cases.window_view(jnp.arange(26)[None], 6, INDEX)
    bookmarks = cases.build_index(k, INDEX, None)
    choice, _ = cases.search(q, k, bookmarks, view, index=INDEX)
    assert choice[0, 0, -1].tolist() == [4, 1, 2, 3]
    narrow = dataclasses.replace(INDEX, A=2)
    choice, _ = cases.search(q, k, bookmarks, view, index=narrow)
    assert choice[0, 0, -1].tolist() == [4, 1]
    assert choice[0, 0, 8:10].tolist() == [[1, -1]] * 2, "the rest is in the window"


def test_learned_spans_begin_where_projections_turn_away():
    """Those that swap two topics see a turn where nothing changes, and none where they change into each other."""
    index = dataclasses.replace(INDEX, spans="learned", span_blocks=4)
    k = keys_about([5, 0, 0, 1, 0, 1, 1, 1, 2, 2, 2, 2])
    same = jnp.eye(8)
    swapped = same[jnp.array([1, 0, *range(2, 8)])]
    boundary = turn.Boundary(swapped[None], same[None])
    spans = build.build_index(k, index, boundary=boundary).spans
    turns = [1, 1, 0.5, 0, 0, 0, 0.5, 0.5, 0.5, 0, 0, 0]
    np.testing.assert_allclose(spans.turn_BGM[0, 0], turns, atol=1e-6)
    assert spans.length_BGM[0, 0, :9].tolist() == [1, 1, 4, 0, 0, 0, 1, 1, 4]


@pytest.mark.parametrize("mean_blocks", [1.5, 3.0])
def test_the_ratio_loss_teaches_how_long_spans_are(mean_blocks):
    """From keys that make them longer or shorter at first."""
    index = dataclasses.replace(INDEX, spans="learned", span_blocks=4)
    _, k = cases.queries_and_keys(1, (2, 512, 2, 2, 8), index, 0)
    k += 0.4

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(boundary):
        spans = build.build_index(k, index, boundary=boundary).spans
        return turn.ratio(span.learned(spans, index), mean_blocks)

    boundary, found = turn.Boundary(*jnp.tile(jnp.eye(8), (2, 2, 1, 1))), []
    for _ in range(60):
        (_, length), gradient = loss(boundary)
        boundary = jax.tree.map(lambda x, g: x - 4 * g, boundary, gradient)
        found.append(float(length))
    assert 2.5 < found[0] < 2.9
    assert abs(np.mean(found[-10:]) - mean_blocks) < 0.1


def test_learned_spans_without_projections_say_so():
    index = dataclasses.replace(INDEX, spans="learned")
    with pytest.raises(ValueError, match="needs the projections"):
        build.build_index(keys_about([0, 1]), index)


def test_spans_follow_each_other():
    random = np.random.default_rng(0)
    length_BGN = random.integers(1, 4, (2, 3, 40))
    rest_BG = random.integers(0, 3, (2, 3))
    found = span.begin(jnp.asarray(length_BGN), jnp.asarray(rest_BG), INDEX)
    for b, g in np.ndindex(2, 3):
        expected, place = [0] * 40, int(rest_BG[b, g])
        while place < 40:
            expected[place] = int(length_BGN[b, g, place])
            place += expected[place]
        assert found[b, g].tolist() == expected


def test_a_window_shorter_than_a_span_says_so():
    k = keys_about([0] * 8)
    view = cases.window_view(jnp.arange(16)[None], 4, INDEX)
    bookmarks = cases.build_index(k, INDEX, None)
    with pytest.raises(ValueError, match="window of 2 blocks is shorter"):
        cases.search(jnp.zeros((1, 16, 1, 8)), k, bookmarks, view, index=INDEX)


@pytest.mark.parametrize("shortest, longest", [(0, 1), (3, 2)])
def test_lengths_that_do_not_fit_say_why(shortest, longest):
    with pytest.raises(ValueError, match="spans of"):
        dataclasses.replace(cases.BASE, span_min_blocks=shortest, span_blocks=longest)
    with pytest.raises(ValueError, match="nothing to learn"):
        dataclasses.replace(cases.BASE, spans="learned")
