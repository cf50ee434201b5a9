"""Keys to an index that grows as they come: the same bookmarks, chapters and links as `build` makes of all of them.

The one exception are turns of learned spans, which are the same to rounding. Arrays have a fixed capacity. A chunk closes the blocks that it completes; these make spans known, whose digests complete
chapters, and then the new bookmarks look for parents. Nothing that a bookmark holds is changed later, but for its list of
children.
Called by decoding, with chunks of any length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import build, chapter, link, precision, settings, span, turn
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrowingIndex:
    """An index with room for more.

    Attributes:
        bookmarks: arrays of the full capacity; entries past the known bookmarks and complete chapters mean nothing,
            and no search looks at them.
        open_BCGK: keys of the block that is not yet closed.
        num_tokens: int32, tokens so far, the same in all rows; or one number a row, see `per_row`.
        is_full: bool, whether keys came that found no room. They, and all keys after them, were not taken.
    """

    bookmarks: build.BookmarkIndex
    open_BCGK: jax.Array
    num_tokens: jax.Array
    is_full: jax.Array


def empty(
    batch: int,
    groups: int,
    width: int,
    index: settings.IndexSettings,
    *,
    capacity_tokens: int,
    dtype=jnp.float32,
) -> GrowingIndex:
    """An index of no tokens.

    Args:
        width: K.
        capacity_tokens: whole blocks.
        dtype: of the keys to come.
    Raises:
        ValueError: the capacity is not whole blocks.
    """
    if capacity_tokens < 1 or capacity_tokens % index.C:
        raise ValueError(
            f"capacity_tokens={capacity_tokens} is not one or more whole blocks of C={index.C} tokens"
        )
    zeros = jnp.zeros((batch, capacity_tokens, groups, width), dtype)
    square = jax.ShapeDtypeStruct((groups, width, width), jnp.float32)
    shape = jax.eval_shape(
        lambda k, boundary: build.build_index(k, index, boundary=boundary),
        *(zeros, turn.Boundary(square, square)),
    )
    bookmarks = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    if index.P:
        links = link.empty(batch, groups, capacity_tokens // index.C, index)
        bookmarks = dataclasses.replace(bookmarks, links=links)
    return GrowingIndex(
        bookmarks, zeros[:, : index.C], jnp.int32(0), jnp.zeros((), bool)
    )


def per_row(grown: GrowingIndex) -> GrowingIndex:
    """The index with a length of its own for each row, as `append_rows` wants it."""
    B = grown.open_BCGK.shape[0]
    return dataclasses.replace(
        grown,
        num_tokens=jnp.broadcast_to(grown.num_tokens, B),
        is_full=jnp.broadcast_to(grown.is_full, B),
    )


def append_rows(
    grown: GrowingIndex,
    k_BSGK,
    count_B,
    index: settings.IndexSettings,
    boundary: turn.Boundary | None = None,
) -> GrowingIndex:
    """Takes the first `count` of S keys, in each row as many as are its own; rows are one document each.

    Where the keys are few and close no block in any row, the index itself is left alone.
    """
    if k_BSGK.shape[1] >= index.C:
        return _append_rows(grown, k_BSGK, count_B, boundary, index)
    closes = (grown.num_tokens % index.C + count_B >= index.C).any()
    return lax.cond(
        closes,
        functools.partial(_append_rows, index=index),
        _wait_rows,
        grown,
        k_BSGK,
        count_B,
        boundary,
    )


def _wait_rows(grown, k_BSGK, count_B, _):
    """`append_rows` of keys that close no block."""
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
    return GrowingIndex(grown.bookmarks, open_BCGK, num_tokens, is_full)


def _append_rows(grown, k_BSGK, count_B, boundary, index):
    """`append_rows`, whatever the keys close."""
    arrays = (grown.bookmarks, grown.open_BCGK)

    def of_row(arrays, num_tokens, is_full, k_SGK, count):
        arrays = jax.tree.map(lambda x: x[None], arrays)
        row = GrowingIndex(*arrays, num_tokens, is_full)
        row = append(row, k_SGK[None], index, count=count, boundary=boundary)
        arrays = jax.tree.map(lambda x: x[0], (row.bookmarks, row.open_BCGK))
        return GrowingIndex(*arrays, row.num_tokens, row.is_full)

    return jax.vmap(of_row)(arrays, grown.num_tokens, grown.is_full, k_BSGK, count_B)


def append(
    grown: GrowingIndex,
    k_BSGK,
    index: settings.IndexSettings,
    start_BS=None,
    count=None,
    boundary: turn.Boundary | None = None,
) -> GrowingIndex:
    """Takes the keys of the next S tokens.

    Args:
        count: int32, how many of the keys there are; what follows them is padding. None: all S.
        start_BS: int32, place in the row where each token's document begins; None: one document a row.
        boundary: what finds learned spans, always the same.
    Returns:
        The index with them; with `is_full` set and nothing else changed if they do not all fit.
    Raises:
        ValueError: the chunk alone is longer than the capacity.
    """
    sizes = shapes.check(k_BSGK=k_BSGK, start_BS=start_BS)
    B, S, G, K = (sizes[letter] for letter in "BSGK")
    capacity, C = grown.bookmarks.point_BGMRK.shape[2], index.C
    if S > capacity * C:
        raise ValueError(
            f"S={S} tokens for an index with a capacity of {capacity * C}: make a larger one"
        )
    num_tokens = grown.num_tokens + (S if count is None else count)
    is_full = grown.is_full | (num_tokens > capacity * C)

    # The open block, the chunk, and room to the end of the last block that the chunk can touch.
    num = (S + C - 1) // C
    keys = jnp.zeros((B, (num + 1) * C, G, K), grown.open_BCGK.dtype)
    keys = keys.at[:, :C].set(grown.open_BCGK)
    keys = lax.dynamic_update_slice_in_dim(
        keys, k_BSGK.astype(keys.dtype), grown.num_tokens % C, axis=1
    )
    first, closed = grown.num_tokens // C, num_tokens // C
    place_M = first + jnp.arange(num, dtype=jnp.int32)
    place_M = jnp.where((place_M < closed) & ~is_full, place_M, capacity)
    if start_BS is None:
        start_BS = jnp.zeros((B, S), jnp.int32)
    last_M = jnp.clip((place_M + 1) * C - 1 - grown.num_tokens, 0, S - 1)
    bookmarks = _extend(
        grown.bookmarks,
        keys[:, : num * C].reshape(B, num, C, G, K).transpose(0, 3, 1, 2, 4),
        place_M,
        (first, closed),
        start_BS[:, last_M],
        boundary,
        index,
    )
    still_open = lax.dynamic_slice_in_dim(keys, (closed - first) * C, C, axis=1)
    return GrowingIndex(
        bookmarks,
        jnp.where(is_full, grown.open_BCGK, still_open),
        jnp.where(is_full, grown.num_tokens, num_tokens),
        is_full,
    )


def _extend(bookmarks, k_BGNCK, place_M, closed, start_BM, boundary, index):
    """The index with new bookmarks at their places; those at a place past the capacity are left out."""
    parts = build.mark(k_BGNCK, place_M, index)
    is_taken = place_M[0] < bookmarks.point_BGMRK.shape[2]
    written_M = place_M
    if bookmarks.spans is not None:
        parts, spans, written_M, place_M, closed = span.extend(
            bookmarks, parts, place_M, start_BM, closed, boundary, index
        )
        bookmarks = dataclasses.replace(bookmarks, spans=spans)
        start_BM = spans.start_BM.at[:, place_M].get(mode="clip")
    point, log_count, quote = parts
    point, scale = precision.pack(point, index.store)

    def put(array, value):
        return array.at[:, :, written_M].set(value, mode="drop")

    # Without the barrier XLA writes once for the result and once more for chapters and links to read, and copies the
    # whole index to do so: a token would cost time linear in the capacity.
    point, log_count, scale = lax.optimization_barrier(
        jax.tree.map(put, bookmarks.nodes[0], (point, log_count, scale))
    )
    bookmarks = dataclasses.replace(
        bookmarks,
        point_BGMRK=point,
        log_count_BGMR=log_count,
        scale_BGMR=scale,
        quote_id_BGMR=put(bookmarks.quote_id_BGMR, quote),
    )
    bookmarks = dataclasses.replace(
        bookmarks,
        chapters=_complete(bookmarks, closed, place_M.shape[0], is_taken, index),
    )
    if not index.P:
        return bookmarks
    low_BM = build.first_bookmark(start_BM, index.C)
    nodes, member_BGM = bookmarks.nodes, bookmarks.member_BGM
    links = link.extend(bookmarks.links, nodes, member_BGM, place_M, low_BM, index)
    return dataclasses.replace(bookmarks, links=links)


def _complete(bookmarks, closed, num, is_taken, index):
    """All levels of chapters, with those that the new bookmarks complete.

    Args:
        closed: bookmarks known before and after.
        num: most bookmarks that are new.
    """
    first, end = closed
    node, made = bookmarks.nodes[0], []
    for level, old in enumerate(bookmarks.chapters):
        group, capacity = index.chapter_bookmarks, old.point_BGERK.shape[2]
        shared = chapter.together(level, index)
        first, end = (n // (group * shared) * shared for n in (first, end))
        num = -(-num // (group * shared)) * shared
        place_E = first + jnp.arange(num, dtype=jnp.int32)
        id_M = (place_E[:, None] * group + jnp.arange(group)).reshape(-1)
        id_M = jnp.minimum(id_M, node[0].shape[2] - 1)
        members = precision.unpack(*jax.tree.map(lambda x, i=id_M: x[:, :, i], node))
        new = chapter.join(*members, id_M, level, index)
        is_new_E = (place_E < end) & is_taken
        place_E = jnp.where(is_new_E, place_E, capacity)
        point = old.point_BGERK.at[:, :, place_E].set(new.point_BGERK, mode="drop")
        log_count = old.log_count_BGER
        log_count = log_count.at[:, :, place_E].set(new.log_count_BGER, mode="drop")
        # As in `_extend`: the next level reads what is written here.
        point, log_count = lax.optimization_barrier((point, log_count))
        node, member = (point, log_count), old.member_BGM
        if member is not None:
            place_M = jnp.where(jnp.repeat(is_new_E, group), id_M, member.shape[2])
            member = member.at[:, :, place_M].set(new.member_BGM, mode="drop")
        made.append(chapter.Chapters(*node, member))
    return tuple(made)
