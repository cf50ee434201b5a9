"""Keys to an index that grows as they come: the same bookmarks, chapters and links as `build` makes of all of them.

The one exception are turns of learned spans, which are the same to rounding. Arrays have a fixed capacity. A chunk closes the blocks that it completes; these make spans known, whose digests complete
chapters, and then the new bookmarks look for parents. Nothing that a bookmark holds is changed later, but for its list of
children.
Called by decoding, with chunks of any length.
"""

import dataclasses
from collections.abc import Sequence

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
        num_tokens: int32, tokens so far, the same in all rows; or one number a row, see `grow_rows`.
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
    return append_layers([grown], [k_BSGK], index, start_BS, count, [boundary])[0]


def append_layers(
    layers: Sequence[GrowingIndex],
    keys,
    index: settings.IndexSettings,
    start_BS=None,
    count=None,
    boundaries=None,
) -> list[GrowingIndex]:
    """`append` to the indexes of several layers that have read the same tokens.

    Digests are made of all layers' keys at once, as of rows of a batch: a program has that part once. Arguments are those of
    `append`, a list of each layer's where it has its own.
    """
    sizes = shapes.check(k_BSGK=keys[0], start_BS=start_BS)
    B, S, G, K = (sizes[letter] for letter in "BSGK")
    grown = layers[0]
    capacity, C = grown.bookmarks.point_BGMRK.shape[2], index.C
    if S > capacity * C:
        raise ValueError(
            f"S={S} tokens for an index with a capacity of {capacity * C}: make a larger one"
        )
    num_tokens = grown.num_tokens + (S if count is None else count)
    is_full = grown.is_full | (num_tokens > capacity * C)

    # The open block, the chunk, and room to the end of the last block that the chunk can touch.
    num = (S + C - 1) // C

    def behind(open_BCGK, k_BSGK):
        known = jnp.zeros((B, (num + 1) * C, G, K), open_BCGK.dtype)
        known = known.at[:, :C].set(open_BCGK)
        return lax.dynamic_update_slice_in_dim(
            known, k_BSGK.astype(known.dtype), grown.num_tokens % C, axis=1
        )

    known = [behind(x.open_BCGK, k_BSGK) for x, k_BSGK in zip(layers, keys)]
    first, closed = grown.num_tokens // C, num_tokens // C
    place_M = first + jnp.arange(num, dtype=jnp.int32)
    place_M = jnp.where((place_M < closed) & ~is_full, place_M, capacity)
    if start_BS is None:
        start_BS = jnp.zeros((B, S), jnp.int32)
    last_M = jnp.clip((place_M + 1) * C - 1 - grown.num_tokens, 0, S - 1)
    extended = _extend(
        [x.bookmarks for x in layers],
        [
            x[:, : num * C].reshape(B, num, C, G, K).transpose(0, 3, 1, 2, 4)
            for x in known
        ],
        place_M,
        (first, closed),
        start_BS[:, last_M],
        boundaries or [None] * len(layers),
        index,
    )
    grown_layers = []
    for old, bookmarks, keys_BSGK in zip(layers, extended, known):
        still_open = lax.dynamic_slice_in_dim(keys_BSGK, (closed - first) * C, C, 1)
        grown_layers.append(
            GrowingIndex(
                bookmarks,
                jnp.where(is_full, old.open_BCGK, still_open),
                jnp.where(is_full, old.num_tokens, num_tokens),
                is_full,
            )
        )
    return grown_layers


def _extend(layers, keys, place_M, closed, start_BM, boundaries, index):
    """The layers' indexes with new bookmarks at their places; those at a place past the capacity are left out."""
    parts = _at_once(lambda k_BGNCK: build.mark(k_BGNCK, place_M, index), keys)
    is_taken, num = place_M[0] < layers[0].point_BGMRK.shape[2], place_M.shape[0]
    # Places and how many are known are the same in all layers.
    known, extended = closed, []
    for bookmarks, own, boundary in zip(layers, parts, boundaries):
        bookmarks, known_M, known = _write(
            bookmarks, own, place_M, closed, start_BM, boundary, index
        )
        extended.append(bookmarks)
    extended = _complete(extended, known, num, is_taken, index)
    if not index.P:
        return extended
    linked = []
    for bookmarks in extended:
        start = start_BM
        if bookmarks.spans is not None:
            start = bookmarks.spans.start_BM.at[:, known_M].get(mode="clip")
        links = link.extend(
            *(bookmarks.links, bookmarks.nodes, bookmarks.member_BGM, known_M),
            build.first_bookmark(start, index.C),
            index,
        )
        linked.append(dataclasses.replace(bookmarks, links=links))
    return linked


def _at_once(function, layers):
    """A function of batched arrays, for each of the layers, computed together."""
    B = jax.tree.leaves(layers[0])[0].shape[0]
    joined = function(jax.tree.map(lambda *rows: jnp.concatenate(rows), *layers))
    return [
        jax.tree.map(lambda x, i=i: x[i * B : (i + 1) * B], joined)
        for i in range(len(layers))
    ]


def _write(bookmarks, parts, place_M, closed, start_BM, boundary, index):
    """A layer's index with new bookmarks, the places that are now known, and how many were known before and after."""
    written_M = place_M
    if bookmarks.spans is not None:
        parts, spans, written_M, place_M, closed = span.extend(
            bookmarks, parts, place_M, start_BM, closed, boundary, index
        )
        bookmarks = dataclasses.replace(bookmarks, spans=spans)
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
    return bookmarks, place_M, closed


def _complete(layers, closed, num, is_taken, index):
    """The layers' indexes with all levels of chapters that the new bookmarks complete.

    Args:
        closed: bookmarks known before and after.
        num: most bookmarks that are new.
    """
    first, end = closed
    nodes, made = [bookmarks.nodes[0] for bookmarks in layers], [() for _ in layers]
    for level, some in enumerate(layers[0].chapters):
        group, capacity = index.chapter_bookmarks, some.point_BGERK.shape[2]
        shared = chapter.together(level, index)
        first, end = (n // (group * shared) * shared for n in (first, end))
        num = -(-num // (group * shared)) * shared
        place_E = first + jnp.arange(num, dtype=jnp.int32)
        id_M = (place_E[:, None] * group + jnp.arange(group)).reshape(-1)
        id_M = jnp.minimum(id_M, nodes[0][0].shape[2] - 1)
        is_new_E = (place_E < end) & is_taken
        place_E = jnp.where(is_new_E, place_E, capacity)
        place_M = jnp.where(jnp.repeat(is_new_E, group), id_M, nodes[0][0].shape[2])

        def join(members, id_M=id_M, level=level):
            return chapter.join(*members, id_M, level, index)

        def put(old, new, place):
            return old.at[:, :, place].set(new, mode="drop")

        members = [
            precision.unpack(*jax.tree.map(lambda x, i=id_M: x[:, :, i], node))
            for node in nodes
        ]
        for i, new in enumerate(_at_once(join, members)):
            old = layers[i].chapters[level]
            # As in `_write`: the next level reads what is written here.
            nodes[i] = lax.optimization_barrier(
                (
                    put(old.point_BGERK, new.point_BGERK, place_E),
                    put(old.log_count_BGER, new.log_count_BGER, place_E),
                )
            )
            member = old.member_BGM
            if member is not None:
                member = put(member, new.member_BGM, place_M)
            made[i] += (chapter.Chapters(*nodes[i], member),)
    return [
        dataclasses.replace(bookmarks, chapters=chapters)
        for bookmarks, chapters in zip(layers, made)
    ]
