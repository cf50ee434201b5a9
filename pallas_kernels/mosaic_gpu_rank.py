"""The search kernel of Hopper GPUs: tiles of nodes copied and scored, the best of each query kept. Called by `mosaic_gpu_search`.

A thread block holds 128 queries; a producer warpgroup copies tiles of points, two consumers multiply, join the points of a
node, and keep the best so far in registers, one vector a rank. Of each tile they take the largest score of every row and
sort it in, as often as any row has a score that belongs among its best.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    mosaic_gpu_gather,
    mosaic_gpu_logits,
    mosaic_gpu_matmul,
    mosaic_gpu_plan,
)

PART = mosaic_gpu_plan.PART
CONSUMERS = 2
TOKENS = CONSUMERS * PART
PRODUCTS = 64
"""Products of a row at once: the fewer nodes in a tile, the more points of each are joined by fewer exponentials."""
LOWEST = -1e30
"""Logarithm of no count: finite, so that no inf is subtracted."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes, padded; nodes of a tile, and tiles in the ring.

    X groups are looked at by a query, J by a thread block's; 0: all.
    """

    B: int
    G: int
    T: int
    R: int
    K: int
    X: int
    J: int
    num: int
    nodes: int
    stages: int


class Inputs(NamedTuple):
    q_BTGK: Any
    point_BGRMK: Any
    log_count_BGRM: Any
    low_BT: Any
    high_BT: Any
    begin_BQ: Any  # first tile that a query of each thread block may see
    steps_BGQ: Any  # and how many tiles
    group_BGXT: Any
    tile_BGQJ: Any


class _Shared(NamedTuple):
    q: Any
    low: Any
    high: Any
    point: Any
    log_count: Any
    id: Any
    score: Any
    group: Any
    tile: Any
    better: Any


class _Barriers(NamedTuple):
    q: Any
    full: Any
    free: Any
    tiles: Any


def run(plan, inputs, interpret):
    """Ids and scores, both as float32, [B, G, num, T]."""
    arrays, tree = jax.tree.flatten(inputs)

    def search_nodes(*refs):
        _run_thread(plan, tree.unflatten(refs[: len(arrays)]), *refs[len(arrays) :])

    out = jax.ShapeDtypeStruct((plan.B, plan.G, plan.num, plan.T), jnp.float32)
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matrix(*shape):
        return plgpu.SMEM((*shape, plan.K), jnp.bfloat16, transforms=transforms)

    shared = _Shared(
        q=matrix(CONSUMERS, PART),
        low=plgpu.SMEM((CONSUMERS, PART), jnp.int32),
        high=plgpu.SMEM((CONSUMERS, PART), jnp.int32),
        point=matrix(plan.stages * plan.R, plan.nodes),
        # A copy starts at a multiple of 128 bytes: small tiles leave gaps.
        log_count=plgpu.SMEM((plan.stages * plan.R, max(plan.nodes, 32)), jnp.float32),
        id=plgpu.SMEM((CONSUMERS * plan.num, PART), jnp.float32),
        score=plgpu.SMEM((CONSUMERS * plan.num, PART), jnp.float32),
        group=plgpu.SMEM((CONSUMERS * plan.X, PART), jnp.int32) if plan.X else None,
        tile=plgpu.SMEM((plan.J,), jnp.int32) if plan.J else None,
        better=plgpu.SMEM((CONSUMERS, PART), jnp.float32),
    )
    list_copies = max(1, -(-plan.J // mosaic_gpu_gather.COPY_IDS))
    barriers = _Barriers(
        q=plgpu.Barrier(num_arrivals=3 + plan.X, num_barriers=CONSUMERS),
        full=plgpu.Barrier(num_arrivals=2 * plan.R, num_barriers=plan.stages),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
        tiles=plgpu.Barrier(num_arrivals=list_copies),
    )
    kernel = plgpu.kernel(
        search_nodes,
        out_type=(out, out),
        scratch_types=(shared, barriers),
        grid=(plan.B * plan.G * plan.T // TOKENS,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*arrays)


def _run_thread(plan, inputs, id_ref, score_ref, shared, barriers):
    """What one warpgroup does. Late queries, who see most, come first."""
    warpgroup = lax.axis_index("warpgroup")
    rest, g = mosaic_gpu_plan.divide(lax.axis_index("program"), plan.G)
    b, i = mosaic_gpu_plan.divide(rest, plan.T // TOKENS)
    i = plan.T // TOKENS - 1 - i
    steps = inputs.steps_BGQ[b, g, i]

    def tile_of(step):
        return shared.tile[step] if plan.J else inputs.begin_BQ[b, i] + step

    @pl.when(warpgroup < CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(232, action="increase")
        tokens = pl.ds(i * TOKENS + warpgroup * PART, PART)
        barrier = barriers.q.at[warpgroup]
        for gmem, smem in (
            (inputs.q_BTGK.at[b, tokens, g], shared.q),
            (inputs.low_BT.at[b, tokens], shared.low),
            (inputs.high_BT.at[b, tokens], shared.high),
        ):
            plgpu.copy_gmem_to_smem(gmem, smem.at[warpgroup], barrier)
        for x in range(plan.X):
            smem = shared.group.at[warpgroup * plan.X + x]
            plgpu.copy_gmem_to_smem(
                inputs.group_BGXT.at[b, g, x, tokens], smem, barrier
            )
        plgpu.barrier_wait(barrier)
        if plan.J:
            plgpu.barrier_wait(barriers.tiles)
        best = _search(plan, shared, barriers, warpgroup, tile_of, steps)
        for refs, values in zip(
            ((shared.id, id_ref), (shared.score, score_ref)), zip(*best)
        ):
            for rank, value in enumerate(values):
                refs[0].at[warpgroup * plan.num + rank][...] = value
        plgpu.commit_smem()
        for smem, gmem in ((shared.id, id_ref), (shared.score, score_ref)):
            for rank in range(plan.num):
                plgpu.copy_smem_to_gmem(
                    smem.at[warpgroup * plan.num + rank], gmem.at[b, g, rank, tokens]
                )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        for begin in range(0, plan.J, mosaic_gpu_gather.COPY_IDS):
            some = pl.ds(begin, min(mosaic_gpu_gather.COPY_IDS, plan.J - begin))
            plgpu.copy_gmem_to_smem(
                inputs.tile_BGQJ.at[b, g, i, some], shared.tile.at[some], barriers.tiles
            )
        if plan.J:
            plgpu.barrier_wait(barriers.tiles)
        _produce(plan, inputs, shared, barriers, (b, g), tile_of, steps)


def _produce(plan, inputs, shared, barriers, place, tile_of, steps):
    """Copies tiles of points, and their counts, as fast as the consumers release them."""
    b, g = place

    @pl.loop(0, steps)
    def _load(step):
        slot = lax.rem(step, jnp.int32(plan.stages))
        pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(barriers.free.at[slot]))
        nodes = pl.ds(tile_of(step) * plan.nodes, plan.nodes)
        for r in range(plan.R):
            for gmem, smem in (
                (inputs.point_BGRMK, shared.point),
                (inputs.log_count_BGRM, shared.log_count),
            ):
                plgpu.copy_gmem_to_smem(
                    gmem.at[b, g, r, nodes],
                    smem.at[slot * plan.R + r, pl.ds(0, plan.nodes)],
                    barriers.full.at[slot],
                )

    for stage in range(plan.stages):
        pl.when(stage < steps)(
            lambda stage=stage: plgpu.barrier_wait(barriers.free.at[stage])
        )


def _search(plan, shared, barriers, warpgroup, tile_of, steps):
    """The best of all tiles for a consumer's rows: (id, score) of each rank, float32[64]."""
    row = mosaic_gpu_logits.ROW
    low = plgpu.load(shared.low.at[warpgroup], layout=row)
    high = plgpu.load(shared.high.at[warpgroup], layout=row)
    groups = [
        plgpu.load(shared.group.at[warpgroup * plan.X + x], layout=row)
        for x in range(plan.X)
    ]
    column = plgpu.broadcasted_iota(
        jnp.int32, (PART, plan.nodes), 1, layout=plgpu.Layout.WGMMA
    )
    spread = functools.partial(
        lax.broadcast_in_dim, shape=column.shape, broadcast_dimensions=[0]
    )

    def look(step, best):
        slot = lax.rem(step, jnp.int32(plan.stages))
        plgpu.barrier_wait(barriers.full.at[slot])
        score = _score(plan, shared, slot, shared.q.at[warpgroup])
        plgpu.commit_smem()  # Orders what was read before the copy that comes next.
        plgpu.barrier_arrive(barriers.free.at[slot])
        tile = tile_of(step)
        begin = tile * plan.nodes
        end = high - begin
        if groups:
            looks = functools.reduce(jnp.logical_or, [x == tile for x in groups])
            end = jnp.where(looks, end, 0)
        is_open = (column >= spread(low - begin)) & (column < spread(end))
        # Neither NaN nor a node without points passes.
        score = jnp.where(is_open & (score > LOWEST / 2), score, -jnp.inf)
        number = column.astype(jnp.float32)

        def take(_, carry):
            score, best = carry
            largest = score.max(axis=1)
            is_largest = score == spread(largest)
            place = jnp.where(is_largest, -number, -jnp.inf).max(axis=1)
            score = jnp.where(number == spread(-place), -jnp.inf, score)
            return score, _insert(best, (begin.astype(jnp.float32) - place, largest))

        worst = best[-1][1]
        better = jnp.where(score > spread(worst), 1.0, 0.0).sum(axis=1)
        times = _largest(better, shared.better.at[warpgroup]).astype(jnp.int32)
        times = jnp.minimum(times, plan.num)
        return lax.fori_loop(0, times, take, (score, best))[1]

    def vector(value):
        return plgpu.layout_cast(jnp.full((PART,), value, jnp.float32), row)

    nobody = tuple((vector(-1.0), vector(-jnp.inf)) for _ in range(plan.num))
    return lax.fori_loop(0, steps, look, nobody)


def _largest(x, scratch_ref):
    """The largest element of a vector with an element a row, as a scalar, by way of a consumer's own shared memory.

    A reduction of all axes would go by way of memory that the consumers share.
    """
    scratch_ref[...] = x
    plgpu.commit_smem()
    across = plgpu.load(scratch_ref, layout=mosaic_gpu_logits.COLUMN)
    scratch_ref[...] = lax.broadcast_in_dim(across, (PART, PART), [1]).max(axis=1)
    plgpu.commit_smem()
    return scratch_ref[0]


def _score(plan, shared, slot, q_ref):
    """Logarithms of the mass that each node of a tile promises each row: [64, nodes], nats."""
    largest = total = None
    num = PRODUCTS // plan.nodes
    for first in range(0, plan.R, num):
        places = [slot * plan.R + r for r in range(first, min(first + num, plan.R))]
        logits = mosaic_gpu_matmul.multiply(
            *((q_ref, shared.point.at[x].transpose((1, 0))) for x in places)
        )
        for n, place in enumerate(places):
            log_count = plgpu.load(
                shared.log_count.at[place, pl.ds(0, plan.nodes)],
                layout=mosaic_gpu_logits.COLUMN,
            )
            logits[n] += lax.broadcast_in_dim(log_count, logits[n].shape, [1])
        before, largest = (
            largest,
            functools.reduce(jnp.maximum, logits + [largest] * bool(first)),
        )
        shares = [jnp.exp(x - largest) for x in logits]
        if first:
            shares.append(total * jnp.exp(before - largest))
        total = functools.reduce(jnp.add, shares)
    return largest if plan.R == 1 else largest + jnp.log(total)


def _insert(best, new):
    """Sorts one more (id, score) of each row in; equal ones stay behind those that came first."""
    score, found = new[1], []
    for old in best:
        is_behind = score > old[1]
        pairs = list(zip(new, old))
        found.append(tuple(jnp.where(is_behind, x, y) for x, y in pairs))
        new = tuple(jnp.where(is_behind, y, x) for x, y in pairs)
    return tuple(found)
