"""Chapters that are not by position gather what is alike, within their volume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bsa.index import cases

INDEX = dataclasses.replace(
    cases.BASE, C=2, R=1, A=4, sink_tokens=0, route="chapters", chapter_bookmarks=4
)


@pytest.mark.parametrize("by", ["cluster", "chain"])
def test_a_narrow_beam_finds_what_is_scattered(by):
    """Two topics take turns; a query about one of them looks at one chapter."""
    topic = np.repeat([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0], 2)
    noise = jax.random.normal(jax.random.key(0), (topic.size, 8))
    k = (5 * jax.nn.one_hot(topic, 8) + 0.1 * noise)[None, :, None]
    q = jnp.zeros((1, topic.size, 1, 8)).at[..., 1].set(2.0)
    view = cases.window_view(jnp.arange(topic.size)[None], 4, INDEX)

    def found(**change):
        index = dataclasses.replace(INDEX, beam=1, **change)
        bookmarks = cases.build_index(k, index, None)
        choice, scored = cases.search(q, k, bookmarks, view, index=index)
        blocks = np.asarray(choice[0, 0, -1])
        return bookmarks, topic[2 * blocks[blocks >= 0]], int(scored[0, 0, -1])

    bookmarks, found_topics, scored = found(chapter_by=by, volume_chapters=2)
    member_EM = bookmarks.member_BGM[0, 0].reshape(4, 4)
    assert all(len(set(topic[2 * member_M])) == 1 for member_M in np.asarray(member_EM))
    for first in (0, 8):
        volume = member_EM[first // 4 : first // 4 + 2].reshape(-1)
        assert sorted(volume.tolist()) == list(range(first, first + 8))
    assert found_topics.tolist() == [1] * 4 and scored == 4 + 4
    _, by_position, _ = found()
    assert by_position.mean() < 1
