"""Points that are kept with fewer bits are near those they were, and an index of them is smaller and chooses alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.index import metrics, precision
from tests.bsa.index import cases


@pytest.mark.parametrize(
    "store, error", [("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5001 / 127)]
)
def test_points_keep_so_many_bits(store, error):
    """Error as a share of a point's largest number; zeros and what is not a number stay so."""
    point = jax.random.normal(jax.random.key(0), (5, 3, 16))
    point = point.at[0].set(0).at[1, 0, 2].set(jnp.nan).at[2].multiply(1e-9)
    kept, scale = precision.pack(point, store)
    assert kept.dtype == jnp.dtype(store) and (scale is None) == (store != "int8")
    found, _ = precision.unpack(kept, None, scale)
    largest = jnp.abs(point).max(-1, keepdims=True)
    assert (jnp.abs(found - point) <= error * largest)[2:].all()
    assert not found[0].any() and jnp.isnan(found[1, 0]).any()
    again, _ = precision.unpack(*precision.pack(found, store)[:1], None, scale)
    np.testing.assert_allclose(again[2:], found[2:], rtol=1e-6)


def test_float8_keeps_four_bits_and_has_a_largest():
    point = jax.random.normal(jax.random.key(0), (5, 16))
    rounded = precision.round_point(point, "float8")
    assert (jnp.abs(rounded - point) <= 2**-4 * jnp.abs(point) + 2**-10).all()
    largest = precision.round_point(jnp.array([1e4, -1e9]), "float8")
    np.testing.assert_array_equal(largest, [448, -448])


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_queries_are_rounded_alike_whatever_their_size(exponent):
    q = jax.random.normal(jax.random.key(0), (5, 16))
    rounded = precision.round_query(q, "float8")
    assert (jnp.abs(rounded - q) <= 2**-4 * jnp.abs(q) + 2**-14).all()
    again = precision.round_query(q * 2.0**exponent, "float8")
    np.testing.assert_array_equal(again, rounded * 2.0**exponent)


@pytest.mark.parametrize("store", ["bfloat16", "int8"])
def test_few_choices_change(store):
    index = dataclasses.replace(cases.BASE, A=4)
    q, k = cases.queries_and_keys(3, (1, 256, 4, 2, 16), index, 0)
    view = cases.window_view(jnp.arange(256)[None], 8, index)

    def chosen(**change):
        changed = dataclasses.replace(index, **change)
        bookmarks = cases.build_index(k, changed, None)
        return cases.search(q, k, bookmarks, view, index=changed)[0]

    wanted, exact = chosen(), chosen(X=12)
    assert metrics.recall(chosen(store=store), wanted) > 0.97
    assert metrics.recall(chosen(store=store, X=12), exact) > 0.995
