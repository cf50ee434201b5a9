"""An index that grew is the one that is built at once, to the last bit, however the keys came."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bsa.index import chapter, grow, grow_rows, span
from tests.bsa.index import cases

T = 60
append = jax.jit(grow.append, static_argnames="index")
append_rows = jax.jit(grow_rows.append_rows, static_argnames="index")


@functools.cache
def empty(index, capacity_tokens, batch=2):
    return grow.empty(batch, 2, 6, index, capacity_tokens=capacity_tokens)


def used(bookmarks, num_tokens, index):
    """The closed bookmarks, complete chapters and links, as a tree of arrays."""
    num = int(span.num_known(num_tokens // index.C, index))
    chapters = []
    size = num
    for level, made in enumerate(bookmarks.chapters):
        shared = chapter.together(level, index)
        size = size // (index.chapter_bookmarks * shared) * shared
        if size:
            parts = made.point_BGERK[:, :, :size], made.log_count_BGER[:, :, :size]
            chapters.append(parts)
        if made.member_BGM is not None:
            members = size * index.chapter_bookmarks
            chapters.append(made.member_BGM[:, :, :members])
    whole = dataclasses.replace(bookmarks, chapters=(), spans=None)
    whole = jax.tree.map(lambda x: x[:, :, :num], whole)
    spans = bookmarks.spans
    if spans is not None:
        spans = spans.length_BGM[:, :, :num], spans.start_BM[:, :num]
    return whole, chapters, spans


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@settings(max_examples=4)
@given(
    index=cases.indices(),
    seed=st.integers(0, 999),
    documents=st.integers(0, 2),
    kinds=st.sampled_from([0, 4]),
    spare_blocks=st.sampled_from([0, 7]),
    chunks=st.lists(st.sampled_from([1, 1, 1, 13]), min_size=1, max_size=T),
)
@example(
    index=cases.EVERYTHING, seed=1, documents=1, kinds=0, spare_blocks=7, chunks=[1, 13]
)
def test_growing(index, seed, documents, kinds, spare_blocks, chunks):
    q, k = cases.queries_and_keys(seed, (2, T, 4, 2, 6), index, kinds)
    position = cases.positions(jax.random.key(seed), 2, T, documents)
    view = cases.window_view(position, cases.window_blocks(index) * index.C, index)
    grown = empty(index, T + spare_blocks * index.C)
    taken = 0
    for size in [*chunks, *[13, 1] * T]:
        if taken + size > T:
            continue
        part = slice(taken, taken + size)
        grown = append(
            *(grown, k[:, part]),
            index=index,
            start_BS=view.start_BT[:, part],
            boundary=cases.boundary(index, k),
        )
        taken += size
    assert int(grown.num_tokens) == T and not grown.is_full
    built = cases.build_index(k, index, view.start_BT)
    assert_same(used(grown.bookmarks, T, index), used(built, T, index))
    if index.spans == "learned":
        num = int(span.num_known(T // index.C, index))
        turns = (x.spans.turn_BGM[:, :, :num] for x in (grown.bookmarks, built))
        np.testing.assert_allclose(*turns, atol=1e-6)

    k_capacity = jnp.pad(k, ((0, 0), (0, spare_blocks * index.C), (0, 0), (0, 0)))
    choice, scored = cases.search(q, k_capacity, grown.bookmarks, view, index=index)
    choice_built, scored_built = cases.search(q, k, built, view, index=index)
    np.testing.assert_array_equal(choice, choice_built)
    np.testing.assert_array_equal(scored, scored_built)


@settings(max_examples=2)
@given(index=cases.indices(), seed=st.integers(0, 999))
@example(index=cases.EVERYTHING, seed=1)
def test_layers_grow_together_as_they_do_alone(index, seed):
    """In rows of different lengths, which close blocks at different tokens."""
    _, k = cases.queries_and_keys(seed, (2, T, 4, 2, 6), index, 0)
    keys, boundary = (k, k[:, ::-1]), cases.boundary(index, k)
    apart = [grow_rows.per_row(empty(index, T)) for _ in keys]
    together, taken = apart, 0
    for size in [1, 5, 1, 1, 1, 5, 1, 1, 5, 1, 5]:
        count = jnp.array([size, max(1, size - 2)])
        some = [x[:, taken : taken + size] for x in keys]
        taken += size
        together = append_rows(
            *(together, some, count), index=index, boundaries=[boundary] * 2
        )
        apart = [
            append_rows([own], [x], count, index=index, boundaries=[boundary])[0]
            for own, x in zip(apart, some)
        ]
    assert together[0].num_tokens.tolist() == [27, 19]
    assert_same(together, apart)


def test_keys_past_the_capacity_are_reported_and_not_taken():
    index = dataclasses.replace(cases.BASE, route="graph", P=2)
    _, k = cases.queries_and_keys(1, (2, 24, 4, 2, 6), index, 0)
    grown = append(empty(index, 24), k[:, :21], index=index)
    assert not grown.is_full
    full = append(grown, k[:, :5], index=index)
    assert full.is_full and int(full.num_tokens) == 21
    assert_same(dataclasses.replace(full, is_full=grown.is_full), grown)
    again = append(full, k[:, :1], index=index)
    assert again.is_full
    with pytest.raises(ValueError, match="capacity of 24"):
        grow.append(grown, jnp.zeros((2, 25, 2, 6)), index)
    with pytest.raises(ValueError, match="whole blocks"):
        grow.empty(1, 1, 6, index, capacity_tokens=23)


def test_a_block_is_no_bookmark_before_it_is_closed():
    index = dataclasses.replace(cases.BASE, P=2)
    _, k = cases.queries_and_keys(1, (2, 8, 4, 2, 6), index, 0)
    grown = append(empty(index, 8), k[:, :3], index=index)
    assert_same(grown.bookmarks, empty(index, 8).bookmarks)
    grown = append(grown, k[:, 3:4], index=index)
    built = cases.build_index(k[:, :4], index, None)
    assert_same(used(grown.bookmarks, 4, index), used(built, 4, index))
