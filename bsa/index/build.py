"""Keys to a `BookmarkIndex`. Called by `bsa.model.attention`, read by `route`."""

import dataclasses

import jax

from bsa.index import digest, settings
from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BookmarkIndex:
    """The bookmarks of a sequence; one per block of C tokens, per key/value head.

    Attributes:
        point_BGMRK: float32, R cluster means of the span's keys.
        log_count_BGMR: float32, natural log of the tokens that a point stands for; -inf for an empty cluster.
    """

    point_BGMRK: jax.Array
    log_count_BGMR: jax.Array


def build_index(k_BSGK, index: settings.IndexSettings) -> BookmarkIndex:
    """Leaves a bookmark at every block of keys.

    A bookmark holds its own block only, so it may be read once the block is closed; `route` sees to that. Gradients
    stop here.

    Raises:
        ValueError: S is no multiple of C.
    """
    sizes = shapes.check(k_BSGK=k_BSGK)
    B, S, G, K = (sizes[letter] for letter in "BSGK")
    if S % index.C:
        raise ValueError(
            f"S={S} is no multiple of C={index.C}: pad the sequence to whole blocks"
        )
    k_BGNCK = k_BSGK.reshape(B, S // index.C, index.C, G, K).transpose(0, 3, 1, 2, 4)
    point_BGMRK, log_count_BGMR = digest.cluster(k_BGNCK, index.R, index.lloyd_steps)
    return BookmarkIndex(point_BGMRK, log_count_BGMR)
