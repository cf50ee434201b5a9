"""What chapters prove to be the flat route's choice is just that."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.index import certificate, metrics, reference
from tests.bsa.index import cases

T = 96
prove = jax.jit(
    functools.partial(certificate.prove, scale=cases.SCALE), static_argnames="index"
)


def texts_on_topics(topics):
    """Queries and keys near the topics' centres; each 12 keys share a topic."""
    random = np.random.default_rng(3)
    centre = 3 * random.normal(size=(topics, 6))
    topic_S = np.repeat(random.integers(0, topics, T // 12), 12)
    k_BSGK = centre[topic_S][None, :, None] + 0.2 * random.normal(size=(1, T, 2, 6))
    topic_T = random.integers(0, topics, T)
    q_BTHK = centre[topic_T][None, :, None] + 0.2 * random.normal(size=(1, T, 4, 6))
    return jnp.asarray(q_BTHK, jnp.float32), jnp.asarray(k_BSGK, jnp.float32)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "meanvar", "chapter_levels": 2, "store": "int8"},
        {"digest": "minmax", "X": 3, "chapter_by": "cluster", "volume_chapters": 2},
        {"route": "graph", "P": 2, "span_blocks": 2, "top_p": 0.8, "store": "bfloat16"},
    ],
)
def test_proven_choices_are_those_of_a_flat_route(change):
    change = {"route": "chapters", "beam": 1} | change
    index = dataclasses.replace(cases.BASE, **change)
    q, k = texts_on_topics(4)
    view = cases.window_view(jnp.arange(T)[None], 8, index)
    bookmarks = cases.build_index(k, index, None)
    choice, _ = cases.search(q, k, bookmarks, view, index=index)
    proven = np.asarray(prove(q, bookmarks, view.open_blocks, index=index))
    flat = dataclasses.replace(index, route="flat")
    for g in range(2):
        expected = reference.build(np.asarray(k[0, :, g]), [0] * T, flat)
        for t in np.flatnonzero(proven[0, g]):
            wanted, _ = reference.choose(
                *(int(t), 0, q[0, :, 2 * g : 2 * g + 2], k[0, :, g]),
                *(expected, 8, flat, cases.SCALE),
            )
            assert [n for n in choice[0, g, t].tolist() if n >= 0] == wanted
    late = proven[0, :, T // 2 :].mean()
    assert 0.1 < late < 1, "some that left chapters aside are proven, some not"


def test_all_in_the_beam_is_proven_and_tokens_without_a_choice_do_not_count():
    index = dataclasses.replace(cases.BASE, route="chapters", beam=99)
    q, k = texts_on_topics(4)
    view = cases.window_view(jnp.arange(T)[None], 8, index)
    bookmarks = cases.build_index(k, index, None)
    assert prove(q, bookmarks, view.open_blocks, index=index).all()
    none = jnp.zeros((1, 2, 8), bool)
    assert metrics.share_proven(none, *(x[:, :8] for x in view.open_blocks)) == 1
    assert metrics.share_proven(none, *(x[:, -8:] for x in view.open_blocks)) == 0


def test_what_no_ball_bounds_says_so():
    q, k = texts_on_topics(1)
    for change in {"query_pool": "heads"}, {"route": "strided"}:
        index = dataclasses.replace(cases.BASE, **change)
        with pytest.raises(ValueError, match="only query_pool='mean'"):
            prove(q, cases.build_index(k, index, None), (None, None), index=index)
