"""Bookmarks to chapters, groups of them: the index dictionary. Called by `build`, `grow` and `select`.

A chapter of level 1 holds `chapter_bookmarks` bookmarks, one of level l + 1 as many consecutive chapters of level l. Those
of level 1 are consecutive too, or each `volume_chapters` of them share a volume of consecutive bookmarks among them: the
volume's bookmarks are put in order by cluster or along a chain, and the order is cut into chapters. Only complete groups
and volumes have chapters; what follows the last complete one is searched member by member (`tree`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import cluster, digest, settings
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chapters:
    """The chapters of one level, in order of time.

    Attributes:
        point_BGERK: float32, digest of all bookmarks of the group; see `digest.aggregate`.
        log_count_BGER: float32, natural log of the tokens that a point stands for; -inf for none.
        member_BGM: int32, the bookmarks of one chapter after those of another, in volumes; None where members are
            consecutive.
    """

    point_BGERK: jax.Array
    log_count_BGER: jax.Array
    member_BGM: jax.Array | None


def group(
    point_BGMRK,
    log_count_BGMR,
    index: settings.IndexSettings,
    levels: range,
    first_id=0,
) -> tuple[Chapters, ...]:
    """Complete chapters of some levels, level 0 being those of bookmarks; see `num_levels`.

    Args:
        point_BGMRK, log_count_BGMR: of the members of the first of these levels.
        first_id: the first member.
    """
    shapes.check(point_BGMRK=point_BGMRK, log_count_BGMR=log_count_BGMR)
    made = []
    for level in levels:
        size = index.chapter_bookmarks * together(level, index)
        num = point_BGMRK.shape[2] // size * size
        chapters = join(
            point_BGMRK[:, :, :num],
            log_count_BGMR[:, :, :num],
            first_id + jnp.arange(num, dtype=jnp.int32),
            level,
            index,
        )
        point_BGMRK, log_count_BGMR = chapters.point_BGERK, chapters.log_count_BGER
        made.append(chapters)
    return tuple(made)


def together(level: int, index: settings.IndexSettings) -> int:
    """Chapters that share their members among them."""
    return index.volume_chapters if level == 0 else 1


def num_levels(num_bookmarks: int, index: settings.IndexSettings) -> int:
    """Levels that hold at least one complete chapter, at most `chapter_levels`; none for routes that read none."""
    if index.route not in ("chapters", "graph"):
        return 0
    size = num_bookmarks
    for level in range(index.chapter_levels):
        shared = together(level, index)
        size = size // (index.chapter_bookmarks * shared) * shared
        if not size:
            return level
    return index.chapter_levels


def join(point_BGMRK, log_count_BGMR, id_M, level: int, index: settings.IndexSettings):
    """The `Chapters` of whole groups, or of whole volumes, of members with these ids."""
    B, G, M, _, K = point_BGMRK.shape
    member_BGM = None
    if together(level, index) > 1:
        place_BGM = _order(point_BGMRK, log_count_BGMR, index)
        member_BGM = id_M[place_BGM]
        log_count_BGMR = jnp.take_along_axis(log_count_BGMR, place_BGM[..., None], 2)
        place_BGM11 = place_BGM[..., None, None]
        point_BGMRK = jnp.take_along_axis(point_BGMRK, place_BGM11, 2)
    num = M // index.chapter_bookmarks
    joined = digest.aggregate(
        point_BGMRK.reshape(B, G, num, -1, K),
        log_count_BGMR.reshape(B, G, num, -1),
        index.chapter_R,
        index,
    )
    return Chapters(*joined, member_BGM)


def _order(point_BGMRK, log_count_BGMR, index):
    """int32 places of the bookmarks of each volume, chapter by chapter; those of no token come last."""
    B, G, M = point_BGMRK.shape[:3]
    volume = index.chapter_bookmarks * index.volume_chapters
    is_there = digest.log_tokens(index.digest, log_count_BGMR) > -jnp.inf
    is_there_BGNC = is_there.reshape(B, G, -1, volume)
    centre = digest.centre(index.digest, point_BGMRK, log_count_BGMR)
    centre_BGNCK = centre.reshape(B, G, -1, volume, centre.shape[-1])
    if index.chapter_by == "cluster":
        centre_BGNCK = jnp.where(is_there_BGNC[..., None], centre_BGNCK, 0)
        label_BGNC = cluster.cluster(
            centre_BGNCK,
            index.volume_chapters,
            index.lloyd_steps,
            is_there_BGNC.astype(jnp.float32),
        ).label_BGNC
        label_BGNC = jnp.where(is_there_BGNC, label_BGNC, index.volume_chapters)
        order_BGNC = jnp.argsort(label_BGNC, axis=-1, stable=True)
    else:
        order_BGNC = _chain(digest.direction(centre_BGNCK, index.similarity))
    place = order_BGNC + volume * jnp.arange(M // volume)[:, None]
    return place.reshape(B, G, M)


def _chain(direction_BGNCK):
    """Places from the first bookmark on, each followed by the one most like it of those not yet visited."""
    alike = jnp.einsum("BGNCK,BGNDK->BGNCD", direction_BGNCK, direction_BGNCK)
    alike = jnp.where(jnp.isnan(alike), jnp.finfo(jnp.float32).min, alike)
    place_C = jnp.arange(alike.shape[-1])

    def step(state, _):
        here_BGN, is_open_BGNC = state
        is_open_BGNC &= here_BGN[..., None] != place_C
        alike_BGNC = jnp.take_along_axis(alike, here_BGN[..., None, None], 3)[..., 0, :]
        next_BGN = jnp.argmax(jnp.where(is_open_BGNC, alike_BGNC, -jnp.inf), axis=-1)
        return (next_BGN, is_open_BGNC), here_BGN

    first_BGN = jnp.zeros(alike.shape[:3], jnp.int32)
    is_open_BGNC = jnp.ones(alike.shape[:4], bool)
    _, order_CBGN = lax.scan(step, (first_BGN, is_open_BGNC), length=place_C.shape[0])
    return jnp.moveaxis(order_CBGN, 0, -1)
