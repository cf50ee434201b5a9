"""Keys to a `BookmarkIndex`. Called by `bsa.model.attention`, read by `route`."""

import dataclasses

import jax
import jax.numpy as jnp

from bsa.index import chapter, digest, link, settings
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BookmarkIndex:
    """The bookmarks of a sequence; one per block of C tokens, per key/value head.

    Attributes:
        point_BGMRK: float32, the span's digest; with `clusters` the means of R clusters of its keys.
        log_count_BGMR: float32, natural log of the tokens that a point stands for; -inf for an empty cluster.
        quote_id_BGMR: int32, the token nearest to each point, what a person is shown; -1 where there is none.
        chapters: one `Chapters` per level, the finest first; empty for a flat route.
        links: None if none are sought (P = 0).
    """

    point_BGMRK: jax.Array
    log_count_BGMR: jax.Array
    quote_id_BGMR: jax.Array
    chapters: tuple[chapter.Chapters, ...]
    links: link.Links | None

    @property
    def nodes(self):
        """(point_BGMRK, log_count_BGMR) of the bookmarks, then of each level of chapters."""
        return [
            (self.point_BGMRK, self.log_count_BGMR),
            *((level.point_BGERK, level.log_count_BGER) for level in self.chapters),
        ]


def build_index(k_BSGK, index: settings.IndexSettings, start_BS=None) -> BookmarkIndex:
    """Leaves a bookmark at every block of keys, joins them into chapters and links them.

    A bookmark holds its own block only, so it may be read once the block is closed; `route` sees to that, and to
    chapters being complete. Gradients stop here.

    Args:
        start_BS: int32, place in the row where each token's document begins, which links do not leave; None: one
            document a row.
    Raises:
        ValueError: S is no multiple of C, or 0.
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
    point_BGMRK, log_count_BGMR, quote_BGMR = digest.summarise(k_BGNCK, index)
    place_M = jnp.arange(num, dtype=jnp.int32)
    bookmarks = BookmarkIndex(
        point_BGMRK,
        log_count_BGMR,
        quote_token(quote_BGMR, place_M, index.C),
        chapter.group(point_BGMRK, log_count_BGMR, index),
        None,
    )
    if not index.P:
        return bookmarks
    if start_BS is None:
        start_BS = jnp.zeros((B, S), jnp.int32)
    links = link.extend(
        link.empty(B, G, num, index),
        bookmarks.nodes,
        place_M,
        first_bookmark(start_BS[:, index.C - 1 :: index.C], index.C),
        index,
    )
    return dataclasses.replace(bookmarks, links=links)


def quote_token(quote_BGMR, place_M, key_block: int):
    """Places in a block to tokens of the row; -1 stays."""
    return jnp.where(quote_BGMR < 0, -1, place_M[:, None] * key_block + quote_BGMR)


def first_bookmark(start_BM, key_block: int):
    """The first block that lies wholly in the document that begins at `start`."""
    return -(-start_BM // key_block)
