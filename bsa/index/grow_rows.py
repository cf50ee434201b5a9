"""Indexes of all layers, grown together by the tokens of rows of different lengths. Called by decoding."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import grow, settings


def per_row(grown: grow.GrowingIndex) -> grow.GrowingIndex:
    """The index with a length of its own for each row, as `append_rows` wants it."""
    B = grown.open_BCGK.shape[0]
    return dataclasses.replace(
        grown,
        num_tokens=jnp.broadcast_to(grown.num_tokens, B),
        is_full=jnp.broadcast_to(grown.is_full, B),
    )


def may_wait(num_tokens: int, index: settings.IndexSettings) -> bool:
    """Whether tokens are so few that none of them may choose what they close: it has to be C tokens back."""
    return num_tokens < index.C


def append_rows(
    layers: Sequence[grow.GrowingIndex],
    keys,
    count_B,
    index: settings.IndexSettings,
    boundaries=None,
    after=None,
) -> list[grow.GrowingIndex]:
    """Takes the first `count` of S keys, in each row as many as are its own; rows are one document each.

    Where the keys are few and close no block in any row, the indexes themselves are left alone.

    Args:
        layers: indexes of the same tokens, one of each layer, as `per_row` makes them.
        keys: k_BSGK of each.
        boundaries: `turn.Boundary` of each, or None; None: nobody has one.
        after: floats that depend on all that is read of these indexes as they were. Without them XLA copies an index,
            lest it be written before it is read; it drops barriers before it looks for that.
    """
    boundaries = boundaries or [None] * len(layers)
    arguments = list(layers), list(keys), count_B, list(boundaries)
    close = functools.partial(_append_rows, index=index)
    if not may_wait(keys[0].shape[1], index):
        return close(*arguments)
    closes = (layers[0].num_tokens % index.C + count_B >= index.C).any()
    if after is not None:
        bits = lax.bitcast_convert_type(after.astype(jnp.float32), jnp.int32)
        # Always so, which the compiler doesn't know.
        closes &= ((bits | 1) != 0).all()
    return lax.cond(closes, close, _wait_rows, *arguments)


def _wait_rows(layers, keys, count_B, _):
    """`append_rows` of keys that close no block."""
    return [_wait(grown, k_BSGK, count_B) for grown, k_BSGK in zip(layers, keys)]


def _wait(grown, k_BSGK, count_B):
    (B, S), C = k_BSGK.shape[:2], grown.open_BCGK.shape[1]
    num_tokens = grown.num_tokens + count_B
    is_full = grown.is_full | (num_tokens > grown.bookmarks.point_BGMRK.shape[2] * C)
    takes = (jnp.arange(S) < count_B[:, None]) & ~is_full[:, None]
    place = jnp.where(takes, grown.num_tokens[:, None] % C + jnp.arange(S), C)
    k_BSGK = k_BSGK.astype(grown.open_BCGK.dtype)
    open_BCGK = grown.open_BCGK.at[jnp.arange(B)[:, None], place].set(
        k_BSGK, mode="drop"
    )
    num_tokens = jnp.where(is_full, grown.num_tokens, num_tokens)
    return grow.GrowingIndex(grown.bookmarks, open_BCGK, num_tokens, is_full)


def _append_rows(layers, keys, count_B, boundaries, index):
    """`append_rows`, whatever the keys close."""
    arrays = [(grown.bookmarks, grown.open_BCGK) for grown in layers]
    lengths = [(grown.num_tokens, grown.is_full) for grown in layers]

    def of_row(arrays, lengths, keys, count):
        arrays, keys = jax.tree.map(lambda x: x[None], (arrays, keys))
        rows = [
            grow.GrowingIndex(*own, *length) for own, length in zip(arrays, lengths)
        ]
        rows = grow.append_layers(rows, keys, index, count=count, boundaries=boundaries)
        arrays = [(row.bookmarks, row.open_BCGK) for row in rows]
        arrays = jax.tree.map(lambda x: x[0], arrays)
        return [
            grow.GrowingIndex(*own, row.num_tokens, row.is_full)
            for own, row in zip(arrays, rows)
        ]

    return jax.vmap(of_row)(arrays, lengths, keys, count_B)
