"""Chapters, links and routes equal the NumPy loops, each other where they must, and never look ahead."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bsa.index import link, precision, reference, reference_search, span
from bsa.index.settings import DIGESTS
from tests.bsa.index import cases

T = 64
quick = settings(max_examples=6)

NARROW = dataclasses.replace(
    cases.BASE,
    R=3,
    query_pool="heads",
    store="int8",
    route="graph",
    chapter_bookmarks=2,
    chapter_levels=3,
    chapter_R=1,
    beam=1,
    P=3,
    children=0,
    similarity="pearson",
    link_by="points",
    frontier=6,
    hops=2,
)
"""Finds fewer bookmarks by chapters than its frontier holds."""


def indexed(seed, index, documents, kinds, tokens=T):
    """Queries, keys, their index and what tokens see anyway: one row of two groups."""
    q, k = cases.queries_and_keys(seed, (1, tokens, 4, 2, 6), index, kinds)
    position = cases.positions(jax.random.key(seed), 1, tokens, documents)
    view = cases.window_view(position, cases.window_blocks(index) * index.C, index)
    return q, k, cases.build_index(k, index, view.start_BT), view


def lists(array):
    """Rows of ids without their padding."""
    return [[n for n in row if n >= 0] for row in np.asarray(array).tolist()]


@quick
@given(
    index=cases.indices(),
    seed=st.integers(0, 999),
    documents=st.integers(0, 2),
    kinds=st.sampled_from([0, 1, 4]),
)
@example(index=NARROW, seed=623, documents=2, kinds=0)
@example(index=cases.EVERYTHING, seed=1, documents=1, kinds=0)
def test_index_and_choices(index, seed, documents, kinds):
    if index.span_blocks > 1 or index.volume_chapters > 1:
        kinds = 0  # rounding decides between a + b and b + a
    q, k, bookmarks, view = indexed(seed, index, documents, kinds)
    choice_BGTA, scored_BGT = cases.search(q, k, bookmarks, view, index=index)
    q, k, start_T, choice_BGTA, scored_BGT, bookmarks = jax.device_get(
        (q, k, view.start_BT[0], choice_BGTA, scored_BGT, bookmarks)
    )
    boundary = jax.device_get(cases.boundary(index, k))
    for g in range(2):
        own = boundary and [x[g] for x in boundary]
        expected = reference.build(k[0, :, g], start_T, index, own)
        check_nodes(bookmarks, expected, g)
        cases.check_spans(bookmarks.spans, expected["lengths"], index, g)
        check_links(bookmarks.links, expected["links"], index, g)
        for t in range(T):
            choice, scored = reference.choose(
                t,
                int(start_T[t]),
                q[0, :, 2 * g : 2 * g + 2],
                k[0, :, g],
                expected,
                cases.window_blocks(index) * index.C,
                index,
                cases.SCALE,
            )
            assert lists(choice_BGTA[0, g])[t] == choice, (g, t)
            assert int(scored_BGT[0, g, t]) == scored, (g, t)


def check_nodes(bookmarks, expected, g):
    assert len(bookmarks.nodes) == len(expected["levels"])
    for node, level in zip(bookmarks.nodes, expected["levels"]):
        point, log_count = precision.unpack(*node)
        assert point.shape[2] == len(level)
        for n, digest in enumerate(level):
            cases.check_digest(point[0, g, n], log_count[0, g, n], *digest)


def check_links(links, expected, index, g):
    assert lists(links.parent_BGMP[0, g]) == expected["parent"]
    assert lists(links.child_BGMP[0, g]) == expected["child"]
    assert links.root_BGM[0, g].tolist() == expected["root"]
    assert links.depth_BGM[0, g].tolist() == expected["depth"]
    parents = [p for row in expected["parent"] for p in row]
    count = np.bincount(parents, minlength=len(expected["root"]))
    assert links.num_children_BGM[0, g].tolist() == count.tolist()
    for ours, theirs in zip(links.weight_BGMP[0, g], expected["weight"]):
        padded = theirs + [0] * (index.P - len(theirs))
        np.testing.assert_allclose(ours, padded, atol=1e-5)


@settings(max_examples=3)  # Each index compiles for seconds, then texts are cheap.
@given(index=cases.indices(routes=("chapters", "graph")), seed=st.integers(0, 999))
def test_with_everything_in_the_beam_routes_are_flat(index, seed):
    index = dataclasses.replace(index, beam=99, frontier=99)
    flat = dataclasses.replace(index, route="flat")
    for documents, kinds in itertools.product((0, 1, 2), (0, 4)):
        q, k, bookmarks, view = indexed(seed + documents, index, documents, kinds)
        choice, _ = cases.search(q, k, bookmarks, view, index=index)
        bookmarks_flat = cases.build_index(k, flat, view.start_BT)
        expected, _ = cases.search(q, k, bookmarks_flat, view, index=flat)
        np.testing.assert_array_equal(choice, expected)
        parents = (x.links.parent_BGMP[0, 0] for x in (bookmarks, bookmarks_flat))
        ours, theirs = map(lists, parents)
        assert ours == theirs


@quick
@given(index=cases.indices(), seed=st.integers(0, 999))
def test_the_future_changes_no_bit_of_the_past(index, seed):
    for documents, change in itertools.product((0, 1, 2), (1, 17, T // 2, T - 1)):
        _check_the_past(index, seed + change, documents, change)


def _check_the_past(index, seed, documents, change):
    q, k, bookmarks, view = indexed(seed, index, documents, 0)
    choice, scored = cases.search(q, k, bookmarks, view, index=index)
    q_other, k_other = cases.queries_and_keys(seed + 1, (1, T, 4, 2, 6), index, 0)
    is_past = (jnp.arange(T) < change)[:, None, None]
    q, k = jnp.where(is_past, q, q_other), jnp.where(is_past, k, k_other)
    other = cases.build_index(k, index, view.start_BT)
    choice_other, scored_other = cases.search(q, k, other, view, index=index)
    np.testing.assert_array_equal(choice[:, :, :change], choice_other[:, :, :change])
    np.testing.assert_array_equal(scored[:, :, :change], scored_other[:, :, :change])
    closed = int(span.num_known(change // index.C, index))
    for name in ("parent_BGMP", "weight_BGMP", "root_BGM", "depth_BGM"):
        before, after = getattr(bookmarks.links, name), getattr(other.links, name)
        np.testing.assert_array_equal(before[:, :, :closed], after[:, :, :closed])
    for g, m in np.ndindex(2, closed):
        kept = [
            [n for n in lists(links.child_BGMP[0, g])[m] if n < closed]
            for links in (bookmarks.links, other.links)
        ]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("route", ["chapters", "graph"])
@pytest.mark.parametrize("digest", DIGESTS)
def test_equal_keys_choose_the_first_bookmarks_of_what_they_look_at(digest, route):
    index = dataclasses.replace(
        cases.BASE, digest=digest, route=route, P=2, chapter_levels=2
    )
    q, _ = cases.queries_and_keys(1, (1, T, 4, 2, 6), index, 0)
    k = jnp.ones((1, T, 2, 6))
    view = cases.window_view(jnp.arange(T)[None], 8, index)
    bookmarks = cases.build_index(k, index, None)
    choice, _ = cases.search(q, k, bookmarks, view, index=index)
    assert choice[0, 0, -1].tolist() == [1, 2]
    assert lists(bookmarks.links.parent_BGMP[0, 0])[4] == [0, 1]


@pytest.mark.parametrize("kind", ["dot", "cosine", "pearson"])
def test_similarity(kind):
    random = np.random.default_rng(1)
    ours, theirs = random.normal(size=(3, 2, 5)), random.normal(size=(4, 3, 5))
    ours[0] = 0
    found = link.similarity(jnp.asarray(ours), jnp.asarray(theirs), kind)
    for m, n in np.ndindex(3, 4):
        expected = reference_search.similarity(ours[m], theirs[n], kind)
        np.testing.assert_allclose(found[m, n], expected, atol=1e-5)


@pytest.mark.parametrize("route", ["flat", "chapters", "graph"])
def test_blocks_with_nan_are_neither_chosen_nor_linked(route):
    index = dataclasses.replace(cases.BASE, route=route, P=2)
    q, k = cases.queries_and_keys(1, (1, T, 4, 2, 6), index, 0)
    view = cases.window_view(jnp.arange(T)[None], 8, index)
    k = k.at[0, 5 * index.C + 1, 0, 2].set(jnp.nan)
    bookmarks = cases.build_index(k, index, None)
    choice, _ = cases.search(q, k, bookmarks, view, index=index)
    assert not (choice[0, 0] == 5).any() and (choice[0, 0, -1] >= 0).any()
    assert not (bookmarks.links.parent_BGMP[0, 0] == 5).any()
    assert lists(bookmarks.links.parent_BGMP[0, 0])[5] == []


@pytest.mark.parametrize("route", ["flat", "chapters", "graph"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_texts_shorter_than_what_is_asked_for(route, blocks):
    index = dataclasses.replace(cases.BASE, route=route, P=3, A=9, frontier=9)
    q, k, bookmarks, view = indexed(1, index, 0, 0, tokens=blocks * index.C)
    choice, _ = cases.search(q, k, bookmarks, view, index=index)
    assert choice.shape == (1, 2, blocks * index.C, 9) and (choice == -1).all()
    assert bookmarks.links.parent_BGMP.shape == (1, 2, blocks, 3)


@pytest.mark.parametrize(
    "tokens, message", [(0, "no bookmarks"), (6, "no multiple of C=4")]
)
def test_texts_that_cannot_be_indexed_say_why(tokens, message):
    with pytest.raises(ValueError, match=message):
        cases.build_index(jnp.zeros((1, tokens, 2, 6)), cases.BASE, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"digest": "median"}, "is not one of"),
        ({"route": "tree"}, "is not one of"),
        ({"digest": "minmax", "R": 1}, "two vectors"),
        ({"digest": "meanvar", "chapter_R": 4}, "two vectors"),
        ({"chapter_R": 7}, "6 points of a chapter"),
        ({"chapter_bookmarks": 1}, "at least 2"),
        ({"beam": 0}, "beam=0"),
        ({"P": -1}, "negative"),
        ({"route": "graph"}, "set P above 0"),
        ({"chapter_by": "cluster"}, "at least 2 share"),
        ({"volume_chapters": 2}, "a volume of its own"),
        ({"store": "int8", "span_blocks": 2}, "round twice"),
        ({"top_p": 0.0}, "shares of attention"),
        ({"min_share": 1.0}, "shares of attention"),
        ({"route": "graph", "P": 1, "X": 9}, "cannot give"),
    ],
)
def test_settings_that_do_not_fit_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cases.BASE, **change)
