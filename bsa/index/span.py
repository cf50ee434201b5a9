"""Blocks to spans: a bookmark for up to `span_blocks` blocks that go on about one thing. Called by `build`, `grow`, `select`.

A span ends before the first block that is less like the mean of its blocks than `span_similarity`, but not before
`span_min_blocks`, and never later than `span_blocks`. Equal lengths make it fixed, a shortest one of 1 adaptive. Its
bookmark stands at its first block; the places of its other blocks hold none, so that ids stay those of blocks.

Learned spans end where a block turns away from the one before it, by projections of the means of their keys that a loss
teaches (`turn`).

How long a span from block n would be depends on `span_blocks` blocks from n on and on nothing else; how surely a learned
one begins there, on n and the block before. So all lengths are found at once, and then which of them lie on the path from
the first block. What is known of n is known when those blocks are closed, however long the span became: a window of as many
blocks keeps what is not known yet from being missed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import digest, settings, turn
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """Where spans begin.

    Attributes:
        length_BGM: int32, blocks of the span that begins at a block, 0 inside of one; what stands at the last
            `span_blocks` - 1 closed blocks means nothing yet.
        start_BM: int32, place in the row where the document of each block's last token begins.
        turn_BGM: float32, probability that a span begins at a block; None unless spans are learned.
    """

    length_BGM: jax.Array
    start_BM: jax.Array
    turn_BGM: jax.Array | None


def num_known(num_blocks, index: settings.IndexSettings):
    """Blocks of so many closed ones of which it is known whether a span begins there, and which."""
    return jnp.maximum(num_blocks - index.span_blocks + 1, 0)


def lengths(digests, block_id_N, start_BN, turn_BGN, index):
    """How many blocks a span from each block would have: int32[B, G, N], too few where the array ends too soon.

    A document's spans begin anew at the first block that it may choose, and blocks before that are alone.

    Args:
        digests: point_BGNRK and log_count_BGNR of single blocks.
        block_id_N: int32, rising by one.
        start_BN: as `Spans.start_BM` of these blocks.
        turn_BGN: of `turn.find`; None: spans are not learned.
    """
    point_BGNRK, log_count_BGNR = digests
    shapes.check(point_BGNRK=point_BGNRK, log_count_BGNR=log_count_BGNR)
    is_cut_BN = turn.is_cut(block_id_N, start_BN, index)
    is_cut_BGN = jnp.broadcast_to(is_cut_BN[:, None], point_BGNRK.shape[:3])
    mean_BGNK = digest.centre(index.digest, point_BGNRK, log_count_BGNR)
    total_BGNK, length_BGN = mean_BGNK, jnp.ones_like(is_cut_BGN, jnp.int32)
    goes_on = jnp.ones_like(is_cut_BGN)
    for step in range(1, index.span_blocks):
        next_BGNK = _later(mean_BGNK, step, 0)
        goes_on &= ~_later(is_cut_BGN, step, True)
        if step >= index.span_min_blocks and turn_BGN is not None:
            goes_on &= _later(turn_BGN, step, 1) < 0.5
        elif step >= index.span_min_blocks:
            pair = (total_BGNK / step, next_BGNK)
            pair = (digest.direction(x, index.similarity) for x in pair)
            goes_on &= jnp.multiply(*pair).sum(-1) >= index.span_similarity
        length_BGN += goes_on
        total_BGNK += next_BGNK
    return length_BGN


def settle(parts, block_id_N, start_BN, turn_BGN, rest_BG, num_closed, index):
    """Turns closed blocks into spans as far as these are known.

    Spans of one block, and the last `span_blocks` - 1 blocks, stay as they are.

    Args:
        parts: point_BGNRK, log_count_BGNR and quote_id_BGNR of single blocks.
        block_id_N, start_BN, turn_BGN: as for `lengths`.
        rest_BG: as for `begin`.
        num_closed: blocks of the row that are closed.
    Returns:
        The same parts, and `Spans.length_BGM` of these blocks.
    """
    length_BGN = lengths(parts[:2], block_id_N, start_BN, turn_BGN, index)
    length_BGN = begin(length_BGN, rest_BG, index)
    is_joined_BGN = (block_id_N < num_known(num_closed, index)) & (length_BGN != 1)

    def choose(joined, single):
        more = [1] * (single.ndim - 3)
        return jnp.where(
            is_joined_BGN.reshape(*length_BGN.shape, *more), joined, single
        )

    return tuple(map(choose, _join(parts, length_BGN, index), parts)), length_BGN


def extend(bookmarks, parts, place_M, start_BM, closed, boundary, index):
    """The spans that new blocks make known, together with those before them that were not.

    Args:
        bookmarks: an index of the full capacity, see `grow`.
        parts, start_BM: of the new blocks.
        place_M: their places; past the capacity for none.
        closed: blocks closed before and after.
        boundary: what finds learned spans.
    Returns:
        parts, the index's `Spans`, and the places of all parts that are new or changed; then the places of spans that
        came to be known, and how many blocks were known before and after. Places past the capacity stand for none.
    """
    spans, capacity = bookmarks.spans, bookmarks.point_BGMRK.shape[2]
    first, end = (num_known(num, index) for num in closed)
    place_N = first + jnp.arange(place_M.shape[0] + index.span_blocks - 1)
    new_M = jnp.where(place_M < capacity, place_M - first, place_N.shape[0])

    def behind(array, new, axis):
        """New entries behind those that were not known."""
        at = (slice(None),) * axis
        old = array.at[*at, place_N].get(mode="clip")
        return old.at[*at, new_M].set(new.astype(old.dtype), mode="drop")

    old = bookmarks.point_BGMRK, bookmarks.log_count_BGMR, bookmarks.quote_id_BGMR
    point, *others = (behind(array, new, 2) for array, new in zip(old, parts))
    start_BN = behind(spans.start_BM, start_BM, 1)
    rest_BG = rest(spans.length_BGM, first, index)
    parts = (point.astype(jnp.float32), *others)
    turn_BGN, turn_BGM = turn.find(parts[:2], place_N, start_BN, boundary, index), None
    if (
        turn_BGN is not None
    ):  # The first of these has nothing before it, but is no new one.
        turn_BGN = turn_BGN[:, :, jnp.minimum(new_M, place_N.shape[0] - 1)]
        turn_BGN = behind(spans.turn_BGM, turn_BGN, 2)
    parts, length_BGN = settle(
        parts, place_N, start_BN, turn_BGN, rest_BG, closed[1], index
    )
    is_new = place_M[0] < capacity
    written_N = jnp.where((place_N < closed[1]) & is_new, place_N, capacity)
    if turn_BGN is not None:
        turn_BGM = spans.turn_BGM.at[:, :, written_N].set(turn_BGN, mode="drop")
    spans = Spans(
        spans.length_BGM.at[:, :, written_N].set(length_BGN, mode="drop"),
        spans.start_BM.at[:, written_N].set(start_BN, mode="drop"),
        turn_BGM,
    )
    known_M = place_N[: place_M.shape[0]]
    known_M = jnp.where((known_M < end) & is_new, known_M, capacity)
    return parts, spans, written_N, known_M, (first, end)


def begin(length_BGN, rest_BG, index: settings.IndexSettings):
    """Lengths where spans follow each other, 0 elsewhere.

    Args:
        length_BGN: of `lengths`.
        rest_BG: int32, first blocks that belong to an earlier span; see `rest`.
    """
    # Each block turns the number of blocks still to come into another. Tables of that compose in any order.
    still = jnp.broadcast_to(
        jnp.arange(index.span_blocks - 1), (*length_BGN.shape, index.span_blocks - 1)
    )
    table = jnp.concatenate([length_BGN[..., None] - 1, still], axis=-1)
    table = lax.associative_scan(
        lambda before, after: jnp.take_along_axis(after, before, axis=-1), table, axis=2
    )
    rest_BG1 = rest_BG[..., None]
    after_BGN = jnp.take_along_axis(table, rest_BG1[..., None], axis=-1)[..., 0]
    before_BGN = jnp.concatenate([rest_BG1, after_BGN[..., :-1]], axis=-1)
    return jnp.where(before_BGN == 0, length_BGN, 0)


def rest(length_BGM, num_known, index: settings.IndexSettings):
    """int32[B, G], blocks from `num_known` on that belong to the last span before it."""
    step = jnp.arange(1, index.span_blocks)
    place = num_known - step
    left = length_BGM.at[:, :, jnp.maximum(place, 0)].get(mode="clip") - step
    return jnp.where(place >= 0, left, 0).max(-1, initial=0)


def learned(spans: Spans | None, index: settings.IndexSettings):
    """Whole rows' spans as `turn.Learned`, for losses; None unless they are learned."""
    if index.spans != "learned":
        return None
    place_M = jnp.arange(spans.length_BGM.shape[2], dtype=jnp.int32)
    begin_BGM = lax.cummax(jnp.where(spans.length_BGM > 0, place_M, -1), axis=2)
    is_known_M = place_M < num_known(place_M.shape[0], index)
    return turn.Learned(jnp.where(is_known_M, begin_BGM, -1), spans.turn_BGM)


def expand(place_BGTX, length_BGM, high_BT, num: int):
    """Spans to their blocks below `high`, span after span in the order of the choice, at most `num` of a token.

    Args:
        place_BGTX: int32, where the chosen spans begin, -1 for none.
    Returns:
        block_id_BGTA with A = `num`, -1 after the last.
    """
    shapes.check(place_BGTX=place_BGTX, length_BGM=length_BGM, high_BT=high_BT)
    B, G, T, X = place_BGTX.shape
    here = jnp.maximum(place_BGTX, 0).reshape(B, G, T * X)
    length = jnp.take_along_axis(length_BGM, here, axis=2).reshape(B, G, T, X)
    length = jnp.minimum(length, high_BT[:, None, :, None] - place_BGTX)
    length = jnp.where(place_BGTX < 0, 0, length)
    end = jnp.cumsum(length, axis=-1)
    entry_A = jnp.arange(num)
    which = (end[..., None, :] <= entry_A[:, None]).sum(-1)
    first, begun = (
        jnp.take_along_axis(x, jnp.minimum(which, X - 1), axis=-1)
        for x in (place_BGTX, end - length)
    )
    return jnp.where(which < X, first + entry_A - begun, -1)


def _join(parts, length_BGN, index):
    """Digests and quotes of spans, of no token where none begins.

    A quote is that of the first of the blocks' points that is as near to the span's as any, but for rounding: the mean
    of two is as far from either.
    """
    N, R = parts[0].shape[2:4]
    member = jnp.arange(N)[:, None] + jnp.arange(index.span_blocks)
    point, log_count, quote = (x[:, :, jnp.minimum(member, N - 1)] for x in parts)
    is_member = jnp.arange(index.span_blocks) < length_BGN[..., None]
    log_count = jnp.where(is_member[..., None], log_count, -jnp.inf)
    quote = jnp.where(is_member[..., None], quote, -1)
    point, log_count, quote = (
        x.reshape(*x.shape[:3], -1, *x.shape[5:]) for x in (point, log_count, quote)
    )
    joined, log_joined = digest.aggregate(point, log_count, R, index)
    gap = jnp.square(joined[:, :, :, :, None] - point[:, :, :, None]).sum(-1)
    gap = jnp.where(quote[:, :, :, None] < 0, jnp.inf, gap)
    first = jnp.argmax(gap <= 1.001 * gap.min(-1, keepdims=True), axis=-1)
    quote_joined = jnp.take_along_axis(quote, first, axis=-1)
    is_place = digest.is_place(index.digest, log_joined)
    return joined, log_joined, jnp.where(is_place, quote_joined, -1)


def _later(x, step, missing):
    """What stands `step` places later along N."""
    filling = jnp.full_like(x[:, :, :step], missing)
    return jnp.concatenate([x[:, :, step:], filling], axis=2)
