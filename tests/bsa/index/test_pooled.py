"""Choices of whole query blocks equal the NumPy loops, however the tokens came, and only prompts are read by them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa.index import pooled, reference, route
from bsa.parallel import mesh, select
from tests.bsa.index import cases

T = 48
search = jax.jit(
    functools.partial(pooled.search_blocks, scale=cases.SCALE), static_argnames="index"
)


def pieces(index, q, k, view, bookmarks, first, count, size):
    """Choices of `count` tokens from `first` on, as the first of `size` that a step takes."""
    k_BGMCK = k.reshape(1, -1, index.C, *k.shape[2:]).transpose(0, 3, 1, 2, 4)
    place_BT = jnp.arange(first, first + size)[None]
    q, low, high = (
        jnp.take(x, place_BT[0], axis=1, mode="clip")
        for x in (q, *route.open_blocks(view, index))
    )
    is_real_BT = place_BT < first + count
    q = jnp.where(is_real_BT[..., None, None], q, jnp.nan)
    choice, _ = search(
        q, k_BGMCK, bookmarks, (low, high), place_BT, is_real_BT, index=index
    )
    return np.asarray(choice)[0, :, :count]


@settings(max_examples=4)
@given(index=cases.indices(), seed=st.integers(0, 999))
def test_blocks_choose_as_the_loops_do(index, seed):
    index = dataclasses.replace(index, granularity="block")
    q, k = cases.queries_and_keys(seed, (1, T, 4, 2, 6), index, kinds=0)
    view = cases.window_view(
        jnp.arange(T)[None], cases.window_blocks(index) * index.C, index
    )
    bookmarks = cases.build_index(k, index)
    parts = [(0, 16), (16, 8), (24, 24)]
    made = [pieces(index, q, k, view, bookmarks, *part, size=24) for part in parts]
    choice_GTA = np.concatenate(made, axis=1)
    boundary = jax.device_get(cases.boundary(index, k))
    for g in range(2):
        own = boundary and [x[g] for x in boundary]
        expected = reference.build(k[0, :, g], [0] * T, index, own)
        for t in range(T):
            wanted, _ = reference.choose(
                *(t, 0, q[0, :, 2 * g : 2 * g + 2], k[0, :, g], expected),
                *(cases.window_blocks(index) * index.C, index, cases.SCALE),
            )
            assert [n for n in choice_GTA[g, t].tolist() if n >= 0] == wanted, (g, t)


def test_a_cut_block_chooses_by_the_tokens_that_are_there():
    index = dataclasses.replace(cases.BASE, granularity="block")
    q, k = cases.queries_and_keys(0, (1, T, 4, 2, 6), index, kinds=0)
    view = cases.window_view(jnp.arange(T)[None], 2 * index.C, index)
    bookmarks = cases.build_index(k, index)
    found = pieces(index, q, k, view, bookmarks, first=27, count=8, size=24)
    for first, end in ((27, 32), (32, 35)):
        mean = q[:, first:end].mean(1, keepdims=True)
        alone = dataclasses.replace(index, granularity="token")
        wanted = pieces(
            *(alone, jnp.broadcast_to(mean, q.shape), k, view, bookmarks), first, 1, 1
        )
        np.testing.assert_array_equal(
            found[:, first - 27 : end - 27],
            np.broadcast_to(wanted, (2, end - first, index.A)),
        )


def test_what_is_predicted_is_not_read_by_blocks():
    index = dataclasses.replace(cases.BASE, granularity="block")
    q, k = cases.queries_and_keys(0, (1, T, 4, 2, 6), index, kinds=0)
    view = cases.window_view(jnp.arange(T)[None], 2 * index.C, index)
    with pytest.raises(ValueError, match="granularity='block'.*--decode.granularity"):
        select.choose(q, k, view, index, mesh.ALONE, scale=1.0)
