"""The search kernel of Hopper GPUs: tiles of nodes copied and scored, the best of each query kept. Called by `mosaic_gpu_search`.

A producer warpgroup copies tiles of points for three consumers, which rank the nodes of 64 queries each (`mosaic_gpu_best`).
Where each query looks at some groups only, there are two consumers, with lists and tiles of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    mosaic_gpu_best,
    mosaic_gpu_gather,
    mosaic_gpu_operands,
    mosaic_gpu_plan,
)

PART = mosaic_gpu_plan.PART
REGISTERS = {2: (232, 40), 3: (160, 24)}
"""Of a thread of so many consumers, and of their producer."""
FEW_GROUPS = 12


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes, padded; nodes of a tile, tiles of a group, bits of a tile's number, and tiles in the ring.

    X groups are looked at by a query, J by a consumer's; 0: all.
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
    parts: int
    tile_bits: int
    stages: int
    point_pool: str

    @property
    def consumers(self):
        return count_consumers(self.X)

    @property
    def tokens(self):
        """Queries of a thread block."""
        return self.consumers * PART

    @property
    def rings(self):
        """One for each consumer if they look at different tiles."""
        return self.consumers if self.J else 1

    @property
    def depth(self):
        """Ranks that one look at all tiles makes certain."""
        return mosaic_gpu_best.count_kept(self.nodes, self.num)

    @property
    def adds_points(self):
        """Whether a node is worth all of its points; else logits are in fixed point before the best of them is known."""
        return self.point_pool != "max" and self.R > 1

    @property
    def step(self):
        """What is 1 in a rank's fixed point."""
        range_bits, step_bits = mosaic_gpu_best.RANGE_BITS, mosaic_gpu_best.STEP_BITS
        return 2 ** min(step_bits, 31 - range_bits - self.tile_bits)

    @property
    def bound(self):
        """Steps of the largest score, and one; the lowest is the same below zero."""
        return 2**mosaic_gpu_best.RANGE_BITS * self.step

    @property
    def of_logits(self):
        """What logits are multiplied with, and what is added to them."""
        if self.adds_points:
            return mosaic_gpu_plan.LOG2E, 0.0
        return mosaic_gpu_plan.LOG2E * self.step, mosaic_gpu_best.TO_BITS

    @property
    def looks(self):
        """Most looks at all tiles."""
        return -(-self.num // self.depth)


def count_consumers(X: int) -> int:
    """Three hide one another's waiting; ids of many groups leave a thread too few registers for that."""
    return 3 if X <= FEW_GROUPS else 2


class Inputs(NamedTuple):
    q_BTGK: Any
    point: Any  # [B, G, tiles, R * nodes, K]
    log_count: Any  # [B, G, tiles, R * nodes], as `Plan.of_logits`
    low_BT: Any
    high_BT: Any
    begin_BQ: Any  # first tile that a query of each thread block may see
    steps_BGQ: Any  # tiles of each ring
    group_BGXT: Any
    list_BGQJ: Any  # groups of each ring
    first_BP: Any  # the first tile, and the one after the last, that all queries of a consumer see all of
    end_BP: Any
    scale_BGT: Any  # of each query's products, as `Plan.of_logits`, or None
    spread: Any  # [B, G, tiles, R * nodes], or None
    square_BGT: Any  # of each query, as `Plan.of_logits`; None without spread


class _Shared(NamedTuple):
    q: Any
    low: Any
    high: Any
    point: Any
    log_count: Any
    scale: Any
    spread: Any
    square: Any
    id: Any
    group: Any
    list: Any
    doubt: Any


class _Barriers(NamedTuple):
    q: Any
    full: Any
    free: Any
    lists: Any
    doubt: Any


def run(plan, inputs, interpret):
    """Ids, int32[B, G, num, T]; -1: none."""
    arrays, tree = jax.tree.flatten(inputs)

    def search_nodes(*refs):
        _run_thread(plan, tree.unflatten(refs[: len(arrays)]), *refs[len(arrays) :])

    out = jax.ShapeDtypeStruct((plan.B, plan.G, plan.num, plan.T), jnp.int32)
    dtype = inputs.point.dtype
    swizzle = min(128, plan.K * dtype.itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))

    def matrix(*shape):
        return plgpu.SMEM((*shape, plan.K), dtype, transforms=transforms)

    stages, consumers = plan.rings * plan.stages, plan.consumers
    has_scale, has_spread = (x is not None for x in (inputs.scale_BGT, inputs.spread))
    of_queries = plgpu.SMEM((consumers, PART), jnp.float32)
    # A copy starts at a multiple of 128 bytes: some tiles leave gaps.
    places = mosaic_gpu_operands.round_up(plan.R * plan.nodes, 32)
    of_points = plgpu.SMEM((stages, places), jnp.float32)
    shared = _Shared(
        q=matrix(consumers, PART),
        low=plgpu.SMEM((consumers, PART), jnp.int32),
        high=plgpu.SMEM((consumers, PART), jnp.int32),
        point=matrix(stages, plan.R * plan.nodes),
        log_count=of_points,
        scale=of_queries if has_scale else None,
        spread=of_points if has_spread else None,
        square=of_queries if has_spread else None,
        id=plgpu.SMEM((consumers, plan.num, PART), jnp.int32),
        group=plgpu.SMEM((consumers * plan.X, PART), jnp.int32) if plan.X else None,
        list=plgpu.SMEM((plan.rings, plan.J), jnp.int32) if plan.J else None,
        doubt=plgpu.SMEM((consumers, plan.looks, PART), jnp.float32),
    )
    list_copies = max(1, -(-plan.J // mosaic_gpu_gather.COPY_IDS) * plan.rings)
    barriers = _Barriers(
        q=plgpu.Barrier(
            num_arrivals=3 + has_scale + has_spread + plan.X, num_barriers=consumers
        ),
        full=plgpu.Barrier(num_arrivals=2 + has_spread, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=consumers // plan.rings, num_barriers=stages),
        lists=plgpu.Barrier(num_arrivals=list_copies),
        doubt=plgpu.Barrier(num_arrivals=consumers),
    )
    kernel = plgpu.kernel(
        search_nodes,
        out_type=out,
        scratch_types=(shared, barriers),
        grid=(plan.B * plan.G * plan.T // plan.tokens,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*arrays)


class _Walk(NamedTuple):
    """Tiles that pass through a ring: how many, and the tile of each step; for consumers, those that no query's range cuts."""

    ring: Any
    steps: Any
    locate: Callable[[Any], Any]
    inside: Any = None


def _run_thread(plan, inputs, id_ref, shared, barriers):
    """What one warpgroup does. Late queries, who see most, come first."""
    warpgroup = lax.axis_index("warpgroup")
    rest, g = mosaic_gpu_plan.divide(lax.axis_index("program"), plan.G)
    b, i = mosaic_gpu_plan.divide(rest, plan.T // plan.tokens)
    i = plan.T // plan.tokens - 1 - i

    def walk(ring):
        steps = inputs.steps_BGQ[b, g, i * plan.rings + ring]
        if not plan.J:
            begin = inputs.begin_BQ[b, i]
            return _Walk(ring, steps, lambda step: begin + step)

        def locate(step):
            place, part = mosaic_gpu_plan.divide(step, plan.parts)
            return shared.list[ring, place] * plan.parts + part

        return _Walk(ring, steps, locate)

    consumer_registers, producer_registers = REGISTERS[plan.consumers]

    @pl.when(warpgroup < plan.consumers)
    def _consumer():
        plgpu.set_max_registers(consumer_registers, action="increase")
        tokens = pl.ds(i * plan.tokens + warpgroup * PART, PART)
        barrier = barriers.q.at[warpgroup]
        of_queries = [
            (inputs.q_BTGK.at[b, tokens, g], shared.q),
            (inputs.low_BT.at[b, tokens], shared.low),
            (inputs.high_BT.at[b, tokens], shared.high),
        ]
        if inputs.scale_BGT is not None:
            of_queries.append((inputs.scale_BGT.at[b, g, tokens], shared.scale))
        if inputs.spread is not None:
            of_queries.append((inputs.square_BGT.at[b, g, tokens], shared.square))
        for gmem, smem in of_queries:
            plgpu.copy_gmem_to_smem(gmem, smem.at[warpgroup], barrier)
        for x in range(plan.X):
            smem = shared.group.at[warpgroup * plan.X + x]
            plgpu.copy_gmem_to_smem(
                inputs.group_BGXT.at[b, g, x, tokens], smem, barrier
            )
        plgpu.barrier_wait(barrier)
        if plan.J:
            plgpu.barrier_wait(barriers.lists)
        part = i * plan.consumers + warpgroup
        inside = inputs.first_BP[b, part], inputs.end_BP[b, part]
        own = walk(warpgroup if plan.J else 0)._replace(inside=inside)
        search = functools.partial(
            mosaic_gpu_best.search, plan, shared, barriers, warpgroup, own
        )
        _repeat(plan, shared, barriers, search)
        plgpu.commit_smem()
        for place in range(plan.num):
            plgpu.copy_smem_to_gmem(
                shared.id.at[warpgroup, place], id_ref.at[b, g, place, tokens]
            )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == plan.consumers)
    def _producer():
        plgpu.set_max_registers(producer_registers, action="decrease")
        for ring in range(plan.rings):
            for begin in range(0, plan.J, mosaic_gpu_gather.COPY_IDS):
                some = pl.ds(begin, min(mosaic_gpu_gather.COPY_IDS, plan.J - begin))
                plgpu.copy_gmem_to_smem(
                    inputs.list_BGQJ.at[b, g, i * plan.rings + ring, some],
                    shared.list.at[ring, some],
                    barriers.lists,
                )
        if plan.J:
            plgpu.barrier_wait(barriers.lists)
        arrays = [
            (inputs.point.at[b, g], shared.point),
            (inputs.log_count.at[b, g], shared.log_count),
        ]
        if inputs.spread is not None:
            arrays.append((inputs.spread.at[b, g], shared.spread))
        walks = [walk(ring) for ring in range(plan.rings)]
        _repeat(
            *(plan, shared, barriers),
            lambda look: _produce(plan, barriers, arrays, walks),
        )


def _repeat(plan, shared, barriers, look_at_tiles):
    """Looks at all tiles until no consumer doubts its rows' ranks; all warpgroups as often."""

    def count(look):
        if plan.looks == 1:
            return jnp.int32(plan.looks)
        plgpu.barrier_wait(barriers.doubt)
        doubts = [shared.doubt[x, look, 0] for x in range(plan.consumers)]
        is_doubted = functools.reduce(jnp.maximum, doubts) > 0
        return jnp.where(is_doubted, look + 1, plan.looks)

    def body(look):
        look_at_tiles(look)
        return count(look)

    look_at_tiles(None)
    lax.while_loop(lambda look: look < plan.looks, body, count(jnp.int32(0)))


def _produce(plan, barriers, arrays, walks):
    """Copies tiles of points, and their counts, as fast as the consumers release them."""

    def load(walk, step):
        slot = walk.ring * plan.stages + lax.rem(step, jnp.int32(plan.stages))
        pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(barriers.free.at[slot]))
        tile, rows = walk.locate(step), pl.ds(0, plan.R * plan.nodes)
        for gmem, smem in arrays:
            plgpu.copy_gmem_to_smem(
                gmem.at[tile], smem.at[slot, rows], barriers.full.at[slot]
            )

    @pl.loop(0, functools.reduce(jnp.maximum, [walk.steps for walk in walks]))
    def _load(step):
        for walk in walks:
            pl.when(step < walk.steps)(functools.partial(load, walk, step))

    for walk in walks:
        for stage in range(plan.stages):
            free = barriers.free.at[walk.ring * plan.stages + stage]
            pl.when(stage < walk.steps)(functools.partial(plgpu.barrier_wait, free))
