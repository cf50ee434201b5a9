"""Coarse to fine by the Hopper kernel: what `tree.search` finds for one token after another, for all at once. Called by `route`."""

import functools

import jax.numpy as jnp

from bsa.index import build, judge, precision, settings
from pallas_kernels import dispatch, mosaic_gpu_search, shapes

EDGES = 2
"""Groups that a query looks at beside those of its chapters: where the first and the last node that it sees lie."""


def can_search(
    q_BTHK,
    bookmarks: build.BookmarkIndex,
    index: settings.IndexSettings,
    implementation: str,
) -> bool:
    """Whether the kernel is asked for, and there is one: mixtures of single blocks, one query a group, no links, no budget.

    "auto" asks for it where bfloat16 is what the store is compared in anyway.
    """
    if implementation == "auto" and index.store == "bfloat16":
        implementation = dispatch.resolve("auto")
    if implementation != "mosaic_gpu" or q_BTHK.shape[1] == 1:
        return False
    if index.query_pool != "mean" or index.route == "graph":
        return False
    if index.digest in ("minmax", "meanvar") or judge.has_budget(index):
        return False
    if index.store == "int8" or max(index.span_blocks, index.volume_chapters) > 1:
        return False
    *finer, coarsest = [node[0].shape[2:4] for node in bookmarks.nodes]
    fits = functools.partial(mosaic_gpu_search.fits, q_BTHK.shape[3])
    finds = [index.X or index.A] + [index.beam] * len(finer)
    return fits(*coarsest, finds[-1]) and all(
        fits(*nodes, num, index.chapter_bookmarks, index.beam + EDGES)
        for nodes, num in zip(finer, finds)
    )


def search(q_BTGK, bookmarks, open_blocks, index: settings.IndexSettings):
    """Choices and counts as `route.search_blocks` returns them; the whole shortlist where there is one.

    Args:
        q_BTGK: float32, one query a group, times the scale, as `digest.widen` makes them.
        open_blocks: low_BT and high_BT, as `LocalView.open_blocks`.
    """
    low_BT, high_BT = open_blocks
    shapes.check(q_BTGK=q_BTGK, low_BT=low_BT, high_BT=high_BT)
    group, ranges = index.chapter_bookmarks, [open_blocks]
    square_BTG = None
    if index.digest == "spread":
        q_BTGK, square_BTG = q_BTGK[..., :-1], precision.to_bfloat16(q_BTGK[..., -1])
    for _ in bookmarks.chapters:
        low, high = ranges[-1]
        ranges.append((-(-low // group), high // group))
    last = len(bookmarks.chapters)
    id_BGTX, scored_BGT = None, jnp.int32(0)
    for level in range(last, -1, -1):
        groups = None
        low, high = ranges[level]
        if level == last:
            scored_BT = jnp.maximum(high - low, 0)
            scored_BGT += jnp.repeat(scored_BT[:, None], q_BTGK.shape[2], axis=1)
        else:
            looked_BGTX, count_BGT = _look_below(id_BGTX, low, high, group)
            groups = looked_BGTX, group
            scored_BGT += count_BGT
        point, log_count = precision.unpack(*bookmarks.nodes[level])
        if precision.compared(index, level) == "float8":
            point = precision.to_float8(point)
        widths = None
        if index.digest == "spread":
            point, spread = point[..., :-1], precision.to_bfloat16(point[..., -1])
            widths = square_BTG, spread
        id_BGTX = mosaic_gpu_search.find(
            *(q_BTGK, point, log_count, low, high),
            index.beam if level else index.X or index.A,
            groups=groups,
            widths=widths,
            point_pool=index.point_pool,
        )
    return id_BGTX, scored_BGT


def _look_below(id_BGTX, low_BT, high_BT, group):
    """Groups whose nodes in [low, high) are looked at: those of the chosen chapters, and those that an end cuts.

    Returns:
        group_BGTX, and how many nodes these are: int32[B, G, T].
    """
    is_cut = jnp.stack([low_BT % group != 0, high_BT % group != 0], axis=-1)
    edge_BTX = jnp.stack([low_BT // group, high_BT // group], axis=-1)
    edge_BTX = jnp.where(is_cut & (low_BT < high_BT)[..., None], edge_BTX, -1)
    first_BT, end_BT = -(-low_BT // group) * group, high_BT // group * group
    before_BT = jnp.maximum(jnp.minimum(first_BT, high_BT) - low_BT, 0)
    after_BT = jnp.maximum(high_BT - jnp.maximum(first_BT, end_BT), 0)
    count_BGT = group * (id_BGTX >= 0).sum(-1, dtype=jnp.int32)
    edge_BGTX = jnp.broadcast_to(edge_BTX[:, None], (*id_BGTX.shape[:3], 2))
    looked_BGTX = jnp.concatenate([id_BGTX, edge_BGTX], axis=-1)
    return looked_BGTX, count_BGT + (before_BT + after_BT)[:, None]
