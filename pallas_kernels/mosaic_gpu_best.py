"""The best nodes of 64 rows, by one consumer of the search kernel. Called by `mosaic_gpu_rank`.

It multiplies, joins the points of each node, and keeps, in registers, the few best nodes of each column of the tiles: a tile
costs comparisons of single elements only, and rows are reduced once, after the last tile. A column that dropped a node
which may belong to a row's best is rare. Then the thread block looks at its tiles again, for what comes behind the ranks
that are certain: as many as are kept of a column.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_logits, mosaic_gpu_matmul, mosaic_gpu_plan

PART = mosaic_gpu_plan.PART
PRODUCTS = 128
"""Products of a row at once, in registers: all points of the nodes of a tile, if they are no more."""
DEPTHS = {32: 3, 16: 4}
"""Nodes of a tile, and how many of a column are kept: what fills a consumer's registers."""
LOWEST = -1e30
"""Logarithm of no count: finite, so that no inf is subtracted."""
FAR = 2.0**30
"""An id after all others."""


def search(plan, shared, barriers, warpgroup, walk, look):
    """Ranks a consumer's rows into shared memory, by one look at all tiles.

    Args:
        look: None: the first. Later ones find the ranks from `depth` times their number on.
    """
    row = mosaic_gpu_logits.ROW
    low = plgpu.load(shared.low.at[warpgroup], layout=row)
    high = plgpu.load(shared.high.at[warpgroup], layout=row)
    groups = [
        plgpu.load(shared.group.at[warpgroup * plan.X + x], layout=row)
        for x in range(plan.X)
    ]
    square = None
    if shared.square is not None:
        square = plgpu.load(shared.square.at[warpgroup], layout=row)
    column = plgpu.broadcasted_iota(
        jnp.int32, (PART, plan.nodes), 1, layout=plgpu.Layout.WGMMA
    )
    number = column.astype(jnp.float32)
    spread = functools.partial(
        lax.broadcast_in_dim, shape=column.shape, broadcast_dimensions=[0]
    )
    first = 0 if look is None else look * plan.depth
    ranks = [x.at[warpgroup] for x in (shared.id, shared.score)]
    if look is not None:
        last_id, last_score = (
            spread(plgpu.load(x.at[first - 1], layout=row)) for x in ranks
        )

    def keep(step, kept):
        stage = lax.rem(step, jnp.int32(plan.stages))
        slot = walk.ring * plan.stages + stage
        plgpu.barrier_wait(barriers.full.at[slot])
        tile = walk.locate(step)
        score = _score(plan, shared, slot, shared.q.at[warpgroup], square)
        plgpu.commit_smem()  # Orders what was read before the copy that comes next.
        plgpu.barrier_arrive(barriers.free.at[slot])
        begin = tile * plan.nodes
        end = high - begin
        if groups:
            group, _ = mosaic_gpu_plan.divide(tile, plan.parts)
            looks = functools.reduce(jnp.logical_or, [x == group for x in groups])
            end = jnp.where(looks, end, 0)
        is_open = (column >= spread(low - begin)) & (column < spread(end))
        begin = begin.astype(jnp.float32)
        if look is not None:
            is_behind = (score == last_score) & (number + begin > last_id)
            is_open &= is_behind | (score < last_score)
        best, dropped = kept
        best, (_, score) = _insert(best, (begin, jnp.where(is_open, score, -jnp.inf)))
        return best, jnp.where(score > dropped, score, dropped)

    def fill(value):
        zeros = mosaic_gpu_matmul.zeros(*column.shape, layout=plgpu.Layout.WGMMA)
        return zeros + value

    nothing = fill(-1.0), fill(-jnp.inf)
    kept = [nothing] * plan.depth, nothing[1]
    best, dropped = lax.fori_loop(0, walk.steps, keep, kept)
    best = [(begin + number, score) for begin, score in best]
    lost = dropped.max(axis=1)

    def take(rank, carry):
        """Writes the best of each row, and takes it out of its column."""
        best, _ = carry
        id, score = best[0]
        largest = score.max(axis=1)
        node = jnp.where(score == spread(largest), id, FAR).min(axis=1)
        for x, value in zip(ranks, (node, largest)):
            x.at[rank][...] = value
        is_taken = id == spread(node)
        below = [*best[1:], nothing]
        return [_choose(is_taken, *pair) for pair in zip(below, best)], largest

    _, worst = lax.fori_loop(first, plan.num, take, (best, lost))
    if plan.looks > 1:
        doubt = jnp.where((lost >= worst) & (lost > LOWEST / 2), 1.0, 0.0)
        _spread_largest(doubt, shared.doubt.at[warpgroup, 0 if look is None else look])
        plgpu.barrier_arrive(barriers.doubt)


def _spread_largest(x, scratch_ref):
    """Leaves the largest element of a vector with an element a row in all of a consumer's own shared memory.

    A reduction of all axes would go by way of memory that the consumers share.
    """
    scratch_ref[...] = x
    plgpu.commit_smem()
    across = plgpu.load(scratch_ref, layout=mosaic_gpu_logits.COLUMN)
    scratch_ref[...] = lax.broadcast_in_dim(across, (PART, PART), [1]).max(axis=1)
    plgpu.commit_smem()


def _score(plan, shared, slot, q_ref, square):
    """Logarithms of the mass that each node of a tile, or its best point, promises each row: [64, nodes], to base 2.

    Args:
        square: of each row, times a point's spread joins its products; None: points have none.
    """
    largest = total = None
    num = PRODUCTS // plan.nodes
    for first in range(0, plan.R, num):
        places = pl.ds(first * plan.nodes, min(num, plan.R - first) * plan.nodes)
        (product,) = mosaic_gpu_matmul.multiply(
            (q_ref, shared.point.at[slot, places].transpose((1, 0)))
        )
        of_points = functools.partial(_load_points, slot, places, product.shape)
        logit = product * mosaic_gpu_plan.LOG2E + of_points(shared.log_count)
        if square is not None:
            square_of_rows = lax.broadcast_in_dim(square, product.shape, [0])
            logit += square_of_rows * of_points(shared.spread)
        logits = [
            lax.slice(logit, (0, x), (PART, x + plan.nodes))
            for x in range(0, logit.shape[1], plan.nodes)
        ]
        before, largest = (
            largest,
            functools.reduce(jnp.maximum, logits + [largest] * bool(first)),
        )
        if plan.point_pool == "max" or plan.R == 1:
            continue
        shares = [jnp.exp2(x - largest) for x in logits]
        if first:
            shares.append(total * jnp.exp2(before - largest))
        total = functools.reduce(jnp.add, shares)
    return largest if total is None else largest + jnp.log2(total)


def _load_points(slot, places, shape, shared_ref):
    """A number of each point of a tile, the same in all rows."""
    x = plgpu.load(shared_ref.at[slot, places], layout=mosaic_gpu_logits.COLUMN)
    return lax.broadcast_in_dim(x, shape, [1])


def _insert(best, new):
    """Sorts one more (id, score) of each element in; equal ones stay behind those that came first.

    Returns:
        The best, as many as before, and what is left over.
    """
    found = []
    for old in best:
        is_ahead = new[1] > old[1]
        found.append(_choose(is_ahead, new, old))
        new = _choose(is_ahead, old, new)
    return found, new


def _choose(condition, xs, ys):
    return tuple(jnp.where(condition, x, y) for x, y in zip(xs, ys))
