"""Coarse to fine: the best chapters, then the best of their members, down to bookmarks. Called by `route` and `link`.

A search looks at bookmarks [low, high) only. A chapter takes part if all its bookmarks lie there, and those of the other
chapters of its volume; members of a group, or a volume, that is cut by either end are scored directly. So what a search finds depends on closed bookmarks alone, and with a beam
as wide as the number of chapters it finds what scoring every bookmark would.
"""

import jax.numpy as jnp
from jax import lax

NOWHERE = jnp.iinfo(jnp.int32).max // 2
"""An id past every node; sorts last."""


def search(
    rate,
    sizes,
    low,
    high,
    member_M=None,
    *,
    group: int,
    volume: int,
    beam: int,
    num: int,
):
    """Finds good bookmarks for one query.

    Args:
        rate: function (level, id_X or None for all nodes, is_open_X) -> score_X, -inf where not open; level 0 are the
            bookmarks.
        sizes: nodes of each level, bookmarks first.
        low, high: int32 scalars, the range of bookmarks to look at.
        member_M: int32, the bookmarks of one chapter after those of another; None: they are in order of time.
        group: members of a chapter.
        volume: chapters whose bookmarks are in another order only among each other.
        beam: chapters of each level whose members are scored.
        num: bookmarks wanted.
    Returns:
        id_X: int32 bookmarks, best first, -1 after the last; `num`, or fewer if fewer can be. Equal scores go to the
        lower id.
        scored: int32, nodes of all levels that were scored.
    """
    ranges, shared = [(low, high)], volume
    for _ in sizes[1:]:
        low, high = taking_part(low, high, group, shared)
        ranges.append((low, high))
        shared = 1
    low, high = ranges.pop()
    place = jnp.arange(sizes[-1], dtype=jnp.int32)
    is_open = (place >= low) & (place < high)
    scored = is_open.sum(dtype=jnp.int32)
    id_X = best(
        rate(len(sizes) - 1, None, is_open), place, beam if len(sizes) > 1 else num
    )
    for level in range(len(sizes) - 2, -1, -1):
        chapters, (low, high) = (low, high), ranges.pop()
        if level:
            id_X = _members(id_X, low, high, chapters, group, 1)
        else:
            id_X = _members(id_X, low, high, chapters, group, volume, member_M)
        is_open = (id_X >= low) & (id_X < high)
        scored += is_open.sum(dtype=jnp.int32)
        score_X = rate(level, jnp.clip(id_X, 0, sizes[level] - 1), is_open)
        id_X = best(score_X, id_X, beam if level else num)
    return id_X, scored


def taking_part(low, high, group: int, volume: int):
    """The first chapter that takes part in a search of members [low, high), and the one after the last."""
    size = group * volume
    return -(-low // size) * volume, high // size * volume


def best(score_X, id_X, num: int):
    """Ids of the `num` highest scores (all, if there are fewer), best first; -1 for scores of -inf.

    Equal scores go to the id that stands first.
    """
    return rank(score_X, id_X, num)[1]


def rank(score_X, id_X, num: int):
    """The `num` highest scores, and their ids as `best` has them."""
    score_X, place = lax.top_k(score_X, min(num, score_X.shape[-1]))
    return score_X, jnp.where(score_X > -jnp.inf, id_X[place], -1)


def _members(id_X, low, high, chapters, group, volume, member_M=None):
    """Nodes to score below the chosen chapters, rising; those to leave out are not in [low, high).

    Before the first chapter that takes part, and after the last, up to group * volume - 1 nodes have no chapter.
    """
    first, end = chapters
    chosen = jnp.sort(jnp.where(id_X < 0, NOWHERE // group, id_X))
    below = (chosen[:, None] * group + jnp.arange(group, dtype=jnp.int32)).reshape(-1)
    below = jnp.where(below < end * group, below, NOWHERE)
    if member_M is not None:
        member = member_M[jnp.minimum(below, member_M.shape[0] - 1)]
        below = jnp.sort(jnp.where(below < NOWHERE, member, NOWHERE))
    step = jnp.arange(group * volume - 1, dtype=jnp.int32)
    before = jnp.where(low + step < first * group, low + step, NOWHERE)
    after = jnp.maximum(first, end) * group + step
    return jnp.concatenate([before, below, jnp.where(after < high, after, NOWHERE)])
