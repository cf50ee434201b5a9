"""Bookmarks to chapters, groups of consecutive bookmarks: the index dictionary. Called by `build` and `grow`.

A chapter of level 1 holds `chapter_bookmarks` bookmarks, one of level l + 1 as many chapters of level l. Only complete
groups are chapters; what follows the last complete one is searched member by member (`tree`).
"""

import dataclasses

import jax

from bsa.index import digest, settings
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chapters:
    """The chapters of one level, in order of time.

    Attributes:
        point_BGERK: float32, digest of all bookmarks of the group; see `digest.aggregate`.
        log_count_BGER: float32, natural log of the tokens that a point stands for; -inf for none.
    """

    point_BGERK: jax.Array
    log_count_BGER: jax.Array


def group(
    point_BGMRK,
    log_count_BGMR,
    index: settings.IndexSettings,
    max_levels: int | None = None,
) -> tuple[Chapters, ...]:
    """Levels of complete chapters, the finest first, at most `max_levels`; a level without any ends the list."""
    shapes.check(point_BGMRK=point_BGMRK, log_count_BGMR=log_count_BGMR)
    levels = []
    wanted = num_levels(point_BGMRK.shape[2], index)
    for _ in range(wanted if max_levels is None else min(wanted, max_levels)):
        num = point_BGMRK.shape[2] // index.chapter_bookmarks
        members = index.chapter_bookmarks * num
        point_BGMRK, log_count_BGMR = join(
            point_BGMRK[:, :, :members], log_count_BGMR[:, :, :members], index
        )
        levels.append(Chapters(point_BGMRK, log_count_BGMR))
    return tuple(levels)


def num_levels(num_bookmarks: int, index: settings.IndexSettings) -> int:
    """Levels that hold at least one complete chapter, at most `chapter_levels`; none for routes that read none."""
    if index.route not in ("chapters", "graph"):
        return 0
    sizes = (
        num_bookmarks // index.chapter_bookmarks**level
        for level in range(1, index.chapter_levels + 1)
    )
    return sum(size > 0 for size in sizes)


def join(point_BGMRK, log_count_BGMR, index: settings.IndexSettings):
    """Digests of each `chapter_bookmarks` members in turn: point_BGERK and log_count_BGER."""
    B, G, M, _, K = point_BGMRK.shape
    num = M // index.chapter_bookmarks
    return digest.aggregate(
        point_BGMRK.reshape(B, G, num, -1, K),
        log_count_BGMR.reshape(B, G, num, -1),
        index,
    )
