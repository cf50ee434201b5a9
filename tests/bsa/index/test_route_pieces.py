"""However a row is cut for routing, tokens choose the same blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.index import route
from tests.bsa.index import cases

TOKENS = 20 * 8
"""Twenty pieces: three parts of the row, whose last ends with the row's last bookmarks."""


@pytest.mark.parametrize(
    "change",
    [
        {"store": "int8"},
        {"route": "chapters", "chapter_by": "cluster", "volume_chapters": 2},
    ],
)
def test_later_bookmarks_are_left_out_without_changing_choices(change):
    index = dataclasses.replace(cases.BASE, route_tokens=8, **change)
    assert TOKENS // index.route_tokens > 2 * route.PART_PIECES
    q, k = cases.queries_and_keys(0, (1, TOKENS, 4, 2, 4), index, kinds=0)
    view = cases.window_view(jnp.arange(TOKENS)[None], 2 * index.C, index)
    bookmarks = cases.build_index(k, index)
    whole = dataclasses.replace(index, route_tokens=TOKENS)
    found = cases.search(q, k, bookmarks, view, index=index)
    expected = cases.search(q, k, bookmarks, view, index=whole)
    for ours, theirs in zip(found, expected):
        np.testing.assert_array_equal(ours, theirs)


def test_a_few_tokens_choose_what_they_choose_among_all():
    """Were they taken for the row's first ones, the bookmarks behind these would be left out."""
    index = dataclasses.replace(cases.BASE, route_tokens=8)
    q, k = cases.queries_and_keys(1, (1, TOKENS, 4, 2, 4), index, kinds=0)
    bookmarks = cases.build_index(k, index)
    view = cases.window_view(jnp.arange(TOKENS)[None], 2 * index.C, index)
    few = slice(3, None, TOKENS // 16)
    choice_BGTA, few_BGTA = (
        cases.search(
            *(q[:, part], k, bookmarks),
            jax.tree.map(lambda x, part=part: x[:, part], view),
            index=index,
        )[0]
        for part in (slice(None), few)
    )
    np.testing.assert_array_equal(few_BGTA, choice_BGTA[:, :, few])
