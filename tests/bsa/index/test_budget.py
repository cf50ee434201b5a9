"""A token may choose fewer blocks than it is allowed."""

import dataclasses

import jax.numpy as jnp
import pytest

from tests.bsa.index import cases


@pytest.mark.parametrize("X, pool", [(0, "heads"), (6, "mean")])
def test_budgets_cut_where_the_attention_is(X, pool):
    """Blocks promise 6, 3 and 1 tenths of what the first three do, and the others hardly anything."""
    index = dataclasses.replace(cases.BASE, R=1, A=3, X=X, query_pool=pool)
    logit = jnp.log(jnp.array([1e-4, 3.0, 1.0, 6.0, 1e-4, 1e-4, 1e-4, 1e-4]))
    k = jnp.repeat(logit, index.C)[None, :, None, None]
    q = jnp.full((1, k.shape[1], 2, 1), 1 / cases.SCALE)
    view = cases.window_view(jnp.arange(k.shape[1])[None], 8, index)
    bookmarks = cases.build_index(k, index, None)

    def chosen(**budget):
        small = dataclasses.replace(index, **budget)
        choice, _ = cases.search(q, k, bookmarks, view, index=small)
        return choice[0, 0, -1].tolist()

    assert chosen() == [3, 1, 2]
    assert chosen(top_p=0.85) == [3, 1, -1]
    assert chosen(top_p=0.5) == [3, -1, -1]
    assert chosen(min_share=0.7) == [-1, -1, -1]
    assert chosen(min_share=0.2, top_p=0.5) == [3, -1, -1]
