"""Keys to a `BookmarkIndex`. Called by `bsa.model.attention`, read by `route`."""

import dataclasses

import jax
import jax.numpy as jnp

from bsa.index import chapter, digest, link, precision, settings, span, turn
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BookmarkIndex:
    """The bookmarks of a sequence; a place for one at each block of C tokens, per key/value head.

    Attributes:
        point_BGMRK: digest of the block, or of the span that begins there; with `clusters` the means of R clusters of
            its keys. float32, bfloat16, or int8, which `scale_BGMR` belongs to.
        log_count_BGMR: float32, natural log of the tokens that a point stands for; -inf for an empty cluster.
        quote_id_BGMR: int32, the token nearest to each point, what a person is shown; -1 where there is none.
        chapters: one `Chapters` per level, the finest first; empty for a flat route.
        links: None if none are sought (P = 0).
        spans: None if each bookmark is one of a single block.
        scale_BGMR: float32, what int8 points are multiplied with; None for others.
    """

    point_BGMRK: jax.Array
    log_count_BGMR: jax.Array
    quote_id_BGMR: jax.Array
    chapters: tuple[chapter.Chapters, ...]
    links: link.Links | None
    spans: span.Spans | None
    scale_BGMR: jax.Array | None

    @property
    def nodes(self):
        """Arguments of `precision.unpack` for the bookmarks, then for each level of chapters."""
        return [
            (self.point_BGMRK, self.log_count_BGMR, self.scale_BGMR),
            *((level.point_BGERK, level.log_count_BGER) for level in self.chapters),
        ]

    @property
    def judged(self):
        """What `judge.score` wants of each of the nodes: with the bookmarks', the turns at which their spans begin."""
        bookmarks, *chapters = self.nodes
        turn_BGM = None if self.spans is None else self.spans.turn_BGM
        return [(bookmarks, turn_BGM), *((node, None) for node in chapters)]

    @property
    def member_BGM(self):
        """Of the finest chapters, if there are any."""
        return self.chapters[0].member_BGM if self.chapters else None


@jax.named_scope("index")
def build_index(
    k_BSGK,
    index: settings.IndexSettings,
    start_BS=None,
    boundary: turn.Boundary | None = None,
) -> BookmarkIndex:
    """Leaves a bookmark at every block of keys, joins them into chapters and links them.

    A bookmark holds its own blocks only, so it may be read once these are closed; `route` sees to that, and to
    chapters being complete. What stands at the last `span_blocks` - 1 blocks is no bookmark yet. Gradients stop here, but for
    those of a span's turns to the boundary.

    Args:
        start_BS: int32, place in the row where each token's document begins, which links do not leave; None: one
            document a row. Spans do not either.
        boundary: what finds learned spans.
    Raises:
        ValueError: S is no multiple of C, or 0; or spans are learned, and there is no boundary.
    """
    sizes = shapes.check(k_BSGK=k_BSGK, start_BS=start_BS)
    B, S, G, K = (sizes[letter] for letter in "BSGK")
    if not S:
        raise ValueError("S=0: a text of no tokens has no bookmarks; skip it")
    if S % index.C:
        raise ValueError(
            f"S={S} is no multiple of C={index.C}: pad the sequence to whole blocks"
        )
    num = S // index.C
    k_BSGK = jax.lax.stop_gradient(k_BSGK)
    k_BGNCK = k_BSGK.reshape(B, num, index.C, G, K).transpose(0, 3, 1, 2, 4)
    place_M = jnp.arange(num, dtype=jnp.int32)
    if start_BS is None:
        start_BS = jnp.zeros((B, S), jnp.int32)
    start_BM = start_BS[:, index.C - 1 :: index.C]
    parts, spans = mark(k_BGNCK, place_M, index), None
    if index.span_blocks > 1:
        no_rest = jnp.zeros((B, G), jnp.int32)
        turn_BGM = turn.find(parts[:2], place_M, start_BM, boundary, index)
        parts, length_BGM = span.settle(
            parts, place_M, start_BM, turn_BGM, no_rest, num, index
        )
        spans = span.Spans(length_BGM, start_BM, turn_BGM)
    point_BGMRK, log_count_BGMR, quote_id_BGMR = parts
    point_BGMRK, scale_BGMR = precision.pack(point_BGMRK, index.store)
    kept = precision.unpack(point_BGMRK, log_count_BGMR, scale_BGMR)
    chapters = chapter.group(*kept, index, range(chapter.num_levels(num, index)))
    bookmarks = BookmarkIndex(
        point_BGMRK, log_count_BGMR, quote_id_BGMR, chapters, None, spans, scale_BGMR
    )
    if not index.P:
        return bookmarks
    links = link.extend(
        link.empty(B, G, num, index),
        bookmarks.nodes,
        bookmarks.member_BGM,
        jnp.where(place_M < span.num_known(num, index), place_M, num),
        first_bookmark(start_BM, index.C),
        index,
    )
    return dataclasses.replace(bookmarks, links=links)


def mark(k_BGNCK, place_M, index: settings.IndexSettings):
    """point_BGMRK, log_count_BGMR and quote_id_BGMR of single blocks, which stand at these places of the row.

    Points are float32, but as precise as they will be kept: spans are made of these.
    """
    point, log_count, quote = digest.summarise(k_BGNCK, index)
    point, scale = precision.pack(point, index.store)
    point, log_count = precision.unpack(point, log_count, scale)
    return point, log_count, quote_token(quote, place_M, index.C)


def quote_token(quote_BGMR, place_M, key_block: int):
    """Places in a block to tokens of the row; -1 stays."""
    return jnp.where(quote_BGMR < 0, -1, place_M[:, None] * key_block + quote_BGMR)


def first_bookmark(start_BM, key_block: int):
    """The first block that lies wholly in the document that begins at `start`."""
    return -(-start_BM // key_block)
