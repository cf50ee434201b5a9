"""The best nodes of 64 rows, by one consumer of the search kernel. Called by `mosaic_gpu_rank`.

It multiplies, joins the points of each node, and keeps, in registers, the few best nodes of each column of the tiles: a tile
costs maxima and minima of single elements only, and rows are reduced once, after the last tile. A column that dropped a node
which may belong to a row's best is rare. Then the thread block looks at its tiles again, for what comes behind the ranks
that are certain: as many as are kept of a column.

A node is one integer: its score in fixed point, and in the last bits its tile, such that of equal scores the earlier tile is
ahead. Adding 3 * 2^22 leaves a float32's integer part in its last bits. Scores reach from -1024 to 1024, to base 2, in steps
of 2^-12; of 2^-10 among 2,048 tiles. What is less counts as nothing, what is more as 1024.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_logits, mosaic_gpu_matmul, mosaic_gpu_plan

PART = mosaic_gpu_plan.PART
PRODUCTS = 128
"""Products of a row at once, in registers: all points of the nodes of a tile, if they are no more."""
DEPTHS = {32: 3, 16: 4}
"""Nodes of a tile, and how many of a column are kept, of up to `FEW` that are wanted of a row."""
FEW = 8
MORE = 2
"""That are kept of a column besides, if more are wanted."""
LOWEST = -1e30
"""Logarithm of no count: finite, so that no inf is subtracted."""
FACTORS = 7
"""Differences of groups' numbers whose product a float32 holds: they are below 2^17."""
NOTHING = -(2**31)
"""A rank that no node has."""
TO_BITS = 3 * 2.0**22
ZERO = int(np.float32(TO_BITS).view(np.int32))
RANGE_BITS = 10
"""Of a score before the point, beside its sign."""
STEP_BITS = 12
"""Of a score behind the point, at most."""


def count_kept(nodes, num):
    """How many nodes of a column are kept: ranks that one look at all tiles makes certain."""
    return min(num, DEPTHS[nodes] + (MORE if num > FEW else 0))


class _Rows(NamedTuple):
    """What a consumer's rows are, in registers: a number each, or None."""

    low: Any
    high: Any
    scale: Any
    square: Any
    groups: list[Any]


def search(plan, shared, barriers, warpgroup, walk, look):
    """Ranks a consumer's rows into shared memory, by one look at all tiles.

    Args:
        look: None: the first. Later ones find the ranks from `depth` times their number on.
    """
    rows = _load_rows(plan, shared, warpgroup)
    ids = shared.id.at[warpgroup]
    column = plgpu.broadcasted_iota(
        jnp.int32, (PART, plan.nodes), 1, layout=plgpu.Layout.WGMMA
    )
    first = 0 if look is None else look * plan.depth

    def keep(step, kept):
        stage = lax.rem(step, jnp.int32(plan.stages))
        slot = walk.ring * plan.stages + stage
        plgpu.barrier_wait(barriers.full.at[slot])
        tile = walk.locate(step)
        bits = _score(plan, shared, slot, shared.q.at[warpgroup], rows)
        plgpu.commit_smem()  # Orders what was read before the copy that comes next.
        plgpu.barrier_arrive(barriers.free.at[slot])
        rank = _rank(plan, rows, bits, tile)
        begin = tile * plan.nodes

        def cut(rank):
            is_open = column >= _spread(rows.low - begin, column)
            is_open &= column < _spread(rows.high - begin, column)
            return jnp.where(is_open, rank, NOTHING)

        first_inside, end_inside = walk.inside
        is_cut = (tile < first_inside) | (tile >= end_inside)
        rank = lax.cond(is_cut, cut, lambda rank: rank, rank)
        if look is not None:
            rank = _leave_out(ids, first, begin + column, rank)
        best, dropped = kept
        best, rank = _insert(best, rank)
        return best, jnp.maximum(dropped, rank)

    nothing = _fill_nothing(plan)
    kept = [nothing] * plan.depth, nothing
    best, dropped = lax.fori_loop(0, walk.steps, keep, kept)
    lost = dropped.max(axis=1)
    worst = _take(plan, ids, first, column, best, lost)
    if plan.looks > 1:
        doubt = jnp.where((lost >= worst) & (lost > _lowest(plan)), 1.0, 0.0)
        _spread_largest(doubt, shared.doubt.at[warpgroup, 0 if look is None else look])
        plgpu.barrier_arrive(barriers.doubt)


def _load_rows(plan, shared, warpgroup):
    def load(x):
        if x is None:
            return None
        return plgpu.load(x.at[warpgroup], layout=mosaic_gpu_logits.ROW)

    groups = [
        plgpu.load(
            shared.group.at[warpgroup * plan.X + x], layout=mosaic_gpu_logits.ROW
        )
        for x in range(plan.X)
    ]
    return _Rows(
        *map(load, (shared.low, shared.high, shared.scale, shared.square)),
        [x.astype(jnp.float32) for x in groups],
    )


def _fill_nothing(plan):
    """No rank, in every element of a tile."""
    ranks = jnp.full((PART, plan.nodes), NOTHING, jnp.int32)
    return plgpu.layout_cast(ranks, plgpu.Layout.WGMMA)


def _spread(of_rows, like):
    """A number of each row in all of its columns."""
    return lax.broadcast_in_dim(of_rows, like.shape, [0])


def _leave_out(ids, num, node, rank):
    """Ranks without those of the nodes that have been found: so many of each row."""

    def close(place, rank):
        found = plgpu.load(ids.at[place], layout=mosaic_gpu_logits.ROW)
        return jnp.where(node == _spread(found, node), NOTHING, rank)

    return lax.fori_loop(0, num, close, rank)


def _take(plan, ids, first, column, best, lost):
    """Writes the best of each row, rank by rank, taking them out of their columns; returns the last one's rank."""
    nothing = _fill_nothing(plan)
    tile_mask = 2**plan.tile_bits - 1

    def take(place, carry):
        best, _ = carry
        largest = best[0].max(axis=1)
        is_largest = best[0] == _spread(largest, column)
        of_row = jnp.where(is_largest, column, plan.nodes).min(axis=1)
        node = (tile_mask - (largest & tile_mask)) * plan.nodes + of_row
        ids.at[place][...] = jnp.where(largest > _lowest(plan), node, -1)
        is_taken = is_largest & (column == _spread(of_row, column))
        below = [*best[1:], nothing]
        return [jnp.where(is_taken, *pair) for pair in zip(below, best)], largest

    _, worst = lax.fori_loop(first, plan.num, take, (best, lost))
    return worst


def _spread_largest(x, scratch_ref):
    """Leaves the largest element of a vector with an element a row in all of a consumer's own shared memory.

    A reduction of all axes would go by way of memory that the consumers share.
    """
    scratch_ref[...] = x
    plgpu.commit_smem()
    across = plgpu.load(scratch_ref, layout=mosaic_gpu_logits.COLUMN)
    scratch_ref[...] = lax.broadcast_in_dim(across, (PART, PART), [1]).max(axis=1)
    plgpu.commit_smem()


def _score(plan, shared, slot, q_ref, rows):
    """Bits of the mass' logarithm that each node of a tile, or its best point, promises each row: int32[64, nodes]."""
    largest = total = None
    num = PRODUCTS // plan.nodes
    for first in range(0, plan.R, num):
        places = pl.ds(first * plan.nodes, min(num, plan.R - first) * plan.nodes)
        (product,) = mosaic_gpu_matmul.multiply(
            (q_ref, shared.point.at[slot, places].transpose((1, 0)))
        )
        of_points = functools.partial(_load_points, slot, places, product.shape)
        scale, _ = plan.of_logits
        if rows.scale is not None:
            scale = _spread(rows.scale, product)
        logit = product * scale + of_points(shared.log_count)
        if rows.square is not None:
            logit += _spread(rows.square, product) * of_points(shared.spread)
        if not plan.adds_points:
            logit = lax.bitcast_convert_type(logit, jnp.int32)
        logits = [
            lax.slice(logit, (0, x), (PART, x + plan.nodes))
            for x in range(0, logit.shape[1], plan.nodes)
        ]
        before, largest = (
            largest,
            functools.reduce(jnp.maximum, logits + [largest] * bool(first)),
        )
        if not plan.adds_points:
            continue
        shares = [jnp.exp2(x - largest) for x in logits]
        if first:
            shares.append(total * jnp.exp2(before - largest))
        total = functools.reduce(jnp.add, shares)
    if plan.adds_points:
        score = (largest + jnp.log2(total)) * plan.step + TO_BITS
        largest = lax.bitcast_convert_type(score, jnp.int32)
    return largest


def _load_points(slot, places, shape, shared_ref):
    """A number of each point of a tile, the same in all rows."""
    x = plgpu.load(shared_ref.at[slot, places], layout=mosaic_gpu_logits.COLUMN)
    return lax.broadcast_in_dim(x, shape, [1])


def _is_among(number, others):
    """Whether a whole number is one of others: whether one of the differences is zero, and so their product.

    Multiplying leaves the units that compare free, which have most to do.
    """
    products = [
        functools.reduce(jnp.multiply, [x - number for x in others[i : i + FACTORS]])
        for i in range(0, len(others), FACTORS)
    ]
    return functools.reduce(jnp.minimum, [jnp.abs(x) for x in products]) == 0


def _rank(plan, rows, bits, tile):
    """An integer that is larger if the score is, or, if that is the same, if the tile is earlier; the lowest in other groups."""
    most = ZERO + plan.bound - 1
    if rows.groups:
        group, _ = mosaic_gpu_plan.divide(tile, plan.parts)
        looks = _is_among(group.astype(jnp.float32), rows.groups)
        most = _spread(jnp.where(looks, most, ZERO - plan.bound), bits)
    bits = jnp.minimum(jnp.maximum(bits, ZERO - plan.bound), most)
    # The last 32 bits of what is left if ZERO is taken away.
    rest = (2**plan.tile_bits - 1 - (ZERO << plan.tile_bits) + 2**31) % 2**32 - 2**31
    return (bits << plan.tile_bits) + (rest - tile)


def _lowest(plan):
    """The rank of what scores nothing in the first tile: nodes are above."""
    return (-plan.bound << plan.tile_bits) + 2**plan.tile_bits - 1


def _insert(best, new):
    """Sorts one more rank of each element in.

    Returns:
        The best, as many as before, and what is left over.
    """
    found = []
    for old in best:
        found.append(jnp.maximum(old, new))
        new = jnp.minimum(old, new)
    return found, new
