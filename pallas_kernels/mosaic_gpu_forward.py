"""Forward pass for Hopper GPUs in Pallas Mosaic GPU, called by `mosaic_gpu`.

A thread block works on one or two tiles of query rows (see `mosaic_gpu_plan`). For each, a
producer warpgroup reads the list and gathers key tiles of several key blocks, one bulk copy
a block, into a ring in shared memory; consumer warpgroups multiply on the tensor cores and
keep an online softmax in float32 registers. Two consumers of one tile take turns: while one
computes exponentials, the other has the tensor cores.

After JAX's `attention_mgpu.py` and FlashAttention-3 (arXiv 2407.08608). Not timed yet.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_plan

PART = mosaic_gpu_plan.PART
LOG2E = math.log2(math.e)
LOWEST = -1e30
"""Running maximum of a row that has met no key: finite, so that no inf is subtracted."""
FAR = 2**30
"""Position of a block that isn't listed: after every query."""
COPY_IDS = 256
"""Most elements of one axis in a bulk copy."""

_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Operands(NamedTuple):
    """What the kernel reads, in device memory; padded. None: not part of this call.

    `bias_rows`, [B, G, Q, J, rows], and `segment_rows`, [B, Q, rows], hold what belongs to
    the rows of `token_parts` parts: the tokens of a query block, repeated to fill a part.
    """

    q_BTHK: Any
    k_BSGK: Any
    v_BSGK: Any
    block_id_BGQJ: Any
    count_BGQ: Any
    offset_2: Any  # of queries, of keys
    token_mask_BGQJ: Any = None  # int32
    bias_rows: Any = None
    segment_rows: Any = None
    segment_key_BS: Any = None


class _Shared(NamedTuple):
    """Shared memory; the first axis counts consumers, teams, or teams x stages."""

    q: Any
    k: Any
    v: Any
    lse: Any
    block_id: Any
    token_mask: Any
    bias: Any
    segment_query: Any
    segment_key: Any


class _Barriers(NamedTuple):
    """One each: a consumer, a team x stage (k, v and their release), a team (list, turn)."""

    q: Any
    k: Any
    v: Any
    k_free: Any
    v_free: Any
    lists: Any
    turn: Any


def run(plan, operands, interpret):
    """Attends.

    Returns:
        out_BTHK, and the lse of rows as [B, G, Q, list_parts * 64], natural log.
    """
    names = [x for x, y in operands._asdict().items() if y is not None]
    arrays = [getattr(operands, x) for x in names]

    def body(*refs):
        inputs = Operands(**dict(zip(names, refs)))
        _run_thread(plan, inputs, *refs[len(names) :])

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(operands.q_BTHK.shape, plan.dtype),
            jax.ShapeDtypeStruct(
                (plan.B, plan.G, plan.Q, plan.list_parts * PART), jnp.float32
            ),
        ),
        scratch_types=(_shared_types(plan), _barrier_types(plan)),
        grid=(-(-plan.num_tiles // plan.tiles.teams),),
        grid_names=("program",),
        num_threads=plan.tiles.consumers + plan.tiles.teams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*arrays)


def _shared_types(plan):
    """Shared memory of a thread block."""
    tiles = plan.tiles
    ring = tiles.teams * tiles.stages
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matrix(count, rows):
        return plgpu.SMEM((count, rows, plan.K), plan.dtype, transforms=transforms)

    def ids(*shape):
        return plgpu.SMEM(shape, jnp.int32)

    return _Shared(
        q=matrix(tiles.consumers, PART),
        k=matrix(ring, tiles.keys),
        v=matrix(ring, tiles.keys),
        lse=plgpu.SMEM((tiles.consumers, PART), jnp.float32),
        block_id=ids(tiles.teams, plan.J),
        token_mask=ids(tiles.teams, plan.J) if plan.has_mask else None,
        bias=plgpu.SMEM((ring, plan.blocks, plan.token_parts * PART), jnp.float32)
        if plan.has_bias
        else None,
        segment_query=ids(tiles.consumers, PART) if plan.has_segments else None,
        # A copy starts at a multiple of 128 bytes: short blocks leave gaps.
        segment_key=ids(ring, plan.blocks, max(plan.key_block, 32))
        if plan.has_segments
        else None,
    )


def _barrier_types(plan):
    """Barriers of a thread block. One that gathers counts an arrival a copy."""
    tiles = plan.tiles
    ring = tiles.teams * tiles.stages
    extra = plan.blocks * plan.has_segments + plan.has_bias
    list_copies = -(-plan.J // COPY_IDS) * (1 + plan.has_mask)
    barrier = plgpu.Barrier
    return _Barriers(
        q=barrier(
            num_arrivals=plan.part_heads + plan.has_segments,
            num_barriers=tiles.consumers,
        ),
        k=barrier(num_arrivals=plan.blocks + extra, num_barriers=ring),
        v=barrier(num_arrivals=plan.blocks, num_barriers=ring),
        k_free=barrier(num_arrivals=tiles.parts, num_barriers=ring),
        v_free=barrier(num_arrivals=tiles.parts, num_barriers=ring),
        lists=barrier(num_arrivals=list_copies, num_barriers=tiles.teams),
        turn=barrier(num_arrivals=tiles.parts, num_barriers=tiles.teams),
    )


def _run_thread(plan, inputs, out_BTHK_ref, lse_rows_ref, shared, barriers):
    """What one warpgroup does."""
    tiles = plan.tiles
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < tiles.consumers)
    def _consumer():
        plgpu.set_max_registers(tiles.consumer_registers, action="increase")
        _consume(plan, inputs, out_BTHK_ref, lse_rows_ref, shared, barriers, warpgroup)

    @pl.when(warpgroup >= tiles.consumers)
    def _producer():
        plgpu.set_max_registers(tiles.producer_registers, action="decrease")
        _produce(plan, inputs, shared, barriers, warpgroup - tiles.consumers)


class _Place(NamedTuple):
    """A tile's place: batch, key/value head, query block, first part; key tiles to read."""

    b: Any
    g: Any
    i: Any
    part: Any
    count: Any
    steps: Any


def _locate(plan, inputs, team):
    """The place of a team's tile. Late query blocks, whose lists are long, come first."""
    # The last thread block may have a team too many: it repeats the last tile.
    tile = lax.axis_index("program") * plan.tiles.teams + team
    tile = jnp.minimum(tile, plan.num_tiles - 1)
    rest, part = _divide(tile, plan.list_tiles)
    rest, i = _divide(rest, plan.Q)
    b, g = _divide(rest, plan.G)
    i = plan.Q - 1 - i
    count = inputs.count_BGQ[b, g, i]
    steps = lax.div(count + (plan.blocks - 1), jnp.int32(plan.blocks))
    return _Place(b, g, i, part * plan.tiles.parts, count, steps)


def _divide(x, y):
    """Quotient and remainder of what isn't negative."""
    y = jnp.int32(y)
    return lax.div(x, y), lax.rem(x, y)


def _produce(plan, inputs, shared, barriers, team):
    """Copies a team's list, then its key tiles as fast as the consumers release stages."""
    b, g, i, _, count, steps = _locate(plan, inputs, team)
    lists = [(inputs.block_id_BGQJ, shared.block_id)]
    if plan.has_mask:
        lists.append((inputs.token_mask_BGQJ, shared.token_mask))
    for first in range(0, plan.J, COPY_IDS):
        some = pl.ds(first, min(COPY_IDS, plan.J - first))
        for gmem, smem in lists:
            plgpu.copy_gmem_to_smem(
                gmem.at[b, g, i, some], smem.at[team, some], barriers.lists.at[team]
            )
    plgpu.barrier_wait(barriers.lists.at[team])

    def gather(ids, gmem_BSGK, smem, barrier):
        C = plan.key_block
        for p, block_id in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                gmem_BSGK.at[b, pl.ds(block_id * C, C), g],
                smem.at[pl.ds(p * C, C)],
                barrier,
            )

    @pl.loop(0, steps)
    def _load(step):
        entry = step * plan.blocks
        ids = [shared.block_id[team, entry + p] for p in range(plan.blocks)]
        # The last tile repeats a listed block, which the consumers mask.
        ids = [jnp.where(entry + p < count, x, ids[0]) for p, x in enumerate(ids)]
        slot = team * plan.tiles.stages + lax.rem(step, jnp.int32(plan.tiles.stages))
        again = step >= plan.tiles.stages
        pl.when(again)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
        gather(ids, inputs.k_BSGK, shared.k.at[slot], barriers.k.at[slot])
        if plan.has_segments:
            for p, block_id in enumerate(ids):
                plgpu.copy_gmem_to_smem(
                    inputs.segment_key_BS.at[
                        b, pl.ds(block_id * plan.key_block, plan.key_block)
                    ],
                    shared.segment_key.at[slot, p, pl.ds(0, plan.key_block)],
                    barriers.k.at[slot],
                )
        if plan.has_bias:
            plgpu.copy_gmem_to_smem(
                inputs.bias_rows.at[b, g, i, pl.ds(entry, plan.blocks)],
                shared.bias.at[slot],
                barriers.k.at[slot],
            )
        pl.when(again)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
        gather(ids, inputs.v_BSGK, shared.v.at[slot], barriers.v.at[slot])


class _Rows(NamedTuple):
    """A part's rows, int32[64] each: position of the last key that may be read, and ids."""

    limit: Any
    token: Any
    head: Any
    q_id: Any
    segment: Any


def _describe_rows(plan, inputs, shared, place, part, warpgroup):
    """What the masks need to know of a part's rows."""
    row = plgpu.broadcasted_iota(jnp.int32, (PART,), 0, layout=_ROW) + part * PART
    token = row & (plan.query_block - 1)
    head = row >> int(math.log2(plan.query_block))
    query_offset, key_offset = inputs.offset_2[0], inputs.offset_2[1]
    q_id = token + (place.i * plan.query_block + query_offset)
    limit = jnp.full_like(token, plan.num_keys - 1)
    if plan.causal:
        limit = jnp.minimum(q_id - key_offset, limit)
    segment = None
    if plan.has_segments:
        segment = plgpu.load(shared.segment_query.at[warpgroup], layout=_ROW)
    return _Rows(limit, token, head + place.g * plan.heads, q_id, segment)


def _weigh(plan, inputs, shared, team, slot, place, rows, token_part, entry, s):
    """Logits of one key tile, with -inf where a row may not read; a piece a key block."""
    C = plan.key_block
    key_offset = inputs.offset_2[1]
    column = plgpu.broadcasted_iota(jnp.int32, (PART, C), 1, layout=plgpu.Layout.WGMMA)

    def spread(x, axis):
        return lax.broadcast_in_dim(x, (PART, C), [axis])

    pieces = []
    for p in range(plan.blocks):
        piece = s if plan.blocks == 1 else s[:, p * C : (p + 1) * C]
        block_id = shared.block_id[team, entry + p]
        first = jnp.where(entry + p < place.count, block_id * C, FAR)
        limit = rows.limit - first
        if plan.has_mask:
            chosen = (shared.token_mask[team, entry + p] >> rows.token) & 1
            limit = jnp.where(chosen == 1, limit, -1)
        read = column <= spread(limit, 0)
        ids = ()
        if plan.score_mod or plan.mask_mod:
            k_id = column + (first + key_offset)
            ids = (place.b, spread(rows.head, 0), spread(rows.q_id, 0), k_id)
        if plan.has_segments:
            segment = plgpu.load(
                shared.segment_key.at[slot, p, pl.ds(0, C)], layout=_COLUMN
            )
            read &= spread(rows.segment, 0) == spread(segment, 1)
        if plan.mask_mod:
            read &= plan.mask_mod(*ids)
        if is_scaled(plan):
            piece *= plan.scale
        if plan.score_mod:
            piece = plan.score_mod(piece, *ids)
        if plan.has_bias:
            rows_of_part = pl.ds(token_part * PART, PART)
            piece += spread(
                plgpu.load(shared.bias.at[slot, p, rows_of_part], layout=_ROW), 0
            )
        pieces.append(jnp.where(read, piece, -jnp.inf))
    return pieces


def is_scaled(plan):
    """Whether logits are scaled before the softmax, and not by its multiplication."""
    return plan.score_mod is not None or plan.has_bias or plan.scale <= 0


def _consume(plan, inputs, out_BTHK_ref, lse_rows_ref, shared, barriers, warpgroup):
    """Attends with one part of a team's tile."""
    tiles = plan.tiles
    team, offset = _divide(warpgroup, tiles.parts)
    place = _locate(plan, inputs, team)
    part = place.part + offset
    q_ref = shared.q.at[warpgroup]
    slices = _head_slices(plan, place, part)
    for rows, tokens, head, _ in slices:
        # A row of padding repeats the last head, and isn't stored.
        last = jnp.minimum(head, plan.heads - 1)
        plgpu.copy_gmem_to_smem(
            inputs.q_BTHK.at[place.b, tokens, place.g * plan.heads + last],
            q_ref.at[rows],
            barriers.q.at[warpgroup],
        )
    _, token_part = _divide(part, plan.token_parts)
    if plan.has_segments:
        plgpu.copy_gmem_to_smem(
            inputs.segment_rows.at[place.b, place.i, pl.ds(token_part * PART, PART)],
            shared.segment_query.at[warpgroup],
            barriers.q.at[warpgroup],
        )
    plgpu.barrier_wait(barriers.q.at[warpgroup])
    plgpu.barrier_wait(barriers.lists.at[team])
    rows = _describe_rows(plan, inputs, shared, place, part, warpgroup)
    weigh = functools.partial(
        _weigh,
        plan,
        inputs,
        shared,
        team,
        place=place,
        rows=rows,
        token_part=token_part,
    )
    acc, maximum, total = _attend(
        plan, q_ref, shared, barriers, team, offset, place.steps, weigh
    )

    empty = total == 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, total)
    acc *= lax.broadcast_in_dim(inverse, acc.shape, [0])
    lse = maximum * (1 / LOG2E) + jnp.log(jnp.where(empty, 1.0, total))
    q_ref[...] = acc.astype(plan.dtype)
    shared.lse.at[warpgroup][...] = jnp.where(empty, -jnp.inf, lse)
    plgpu.commit_smem()
    for rows, tokens, head, real in slices:

        @pl.when(real)
        def _store(rows=rows, tokens=tokens, head=head):
            plgpu.copy_smem_to_gmem(
                q_ref.at[rows],
                out_BTHK_ref.at[place.b, tokens, place.g * plan.heads + head],
            )

    plgpu.copy_smem_to_gmem(
        shared.lse.at[warpgroup],
        lse_rows_ref.at[place.b, place.g, place.i, pl.ds(part * PART, PART)],
    )
    plgpu.wait_smem_to_gmem(0)


def _multiply_add(plan, acc, x, y_ref, meanwhile):
    """acc + x @ y on the tensor cores; `meanwhile` runs while they work."""
    if plan.interpreted:
        # Interpret mode has neither `run_state` nor an operand in registers.
        meanwhile()
        return acc + jnp.dot(x, y_ref[...], preferred_element_type=jnp.float32)

    def multiply_add(acc_ref):
        plgpu.wgmma(acc_ref, x, y_ref)
        meanwhile()

    return pl.run_state(multiply_add)(plgpu.ACC.init(acc))


def _head_slices(plan, place, part):
    """For each head of a part: rows of the part, tokens, head of the group, is it real."""
    slices = []
    for first in range(0, PART, plan.head_rows):
        head, token = _divide(part * PART + first, plan.query_block)
        tokens = pl.ds(place.i * plan.query_block + token, plan.head_rows)
        rows = pl.ds(first, plan.head_rows)
        slices.append((rows, tokens, head, head < plan.heads))
    return slices


def _attend(plan, q_ref, shared, barriers, team, offset, steps, weigh):
    """Online softmax of a part over its key tiles.

    Returns:
        The sum of weighted values, the largest logit in bits, and the sum of weights.
    """
    tiles = plan.tiles
    to_bits = LOG2E if is_scaled(plan) else plan.scale * LOG2E

    def take_turn():
        if tiles.parts > 1:
            plgpu.barrier_arrive(barriers.turn.at[team])
            plgpu.barrier_wait(barriers.turn.at[team])

    def slot_of(step):
        return team * tiles.stages + lax.rem(step, jnp.int32(tiles.stages))

    def attend(step, carry):
        acc, maximum, total = carry
        slot = slot_of(step)

        def multiply_keys(acc_ref):
            plgpu.wgmma(acc_ref, q_ref, shared.k.at[slot].transpose((1, 0)))
            take_turn()
            return acc_ref[...]

        s = pl.run_scoped(multiply_keys, plgpu.ACC((PART, tiles.keys), jnp.float32))
        # Bias and segments lie in the stage of the keys.
        keep_stage = plan.has_bias or plan.has_segments
        if not keep_stage:
            plgpu.barrier_arrive(barriers.k_free.at[slot])
        pieces = weigh(slot=slot, entry=step * plan.blocks, s=s)
        if keep_stage:
            plgpu.barrier_arrive(barriers.k_free.at[slot])

        largest = functools.reduce(jnp.maximum, pieces).max(axis=1) * to_bits
        largest = jnp.maximum(maximum, largest)
        decay = jnp.exp2(maximum - largest)
        shift = lax.broadcast_in_dim(largest, pieces[0].shape, [0])
        pieces = [jnp.exp2(x * to_bits - shift) for x in pieces]
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        total = total * decay + functools.reduce(jnp.add, pieces).sum(axis=1)
        pieces = [x.astype(plan.dtype) for x in pieces]
        p = pieces[0] if plan.blocks == 1 else jnp.concatenate(pieces, axis=1)
        acc, total, largest, p = lax.optimization_barrier((acc, total, largest, p))
        if tiles.parts > 1:
            plgpu.barrier_arrive(barriers.turn.at[team])
        plgpu.barrier_wait(barriers.v.at[slot])
        if tiles.parts > 1:
            plgpu.barrier_wait(barriers.turn.at[team])

        def wait_for_keys():
            pl.when(step + 1 < steps)(
                lambda: plgpu.barrier_wait(barriers.k.at[slot_of(step + 1)])
            )

        acc = _multiply_add(plan, acc, p, shared.v.at[slot], wait_for_keys)
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        return acc, largest, total

    carry = (
        plgpu.layout_cast(
            jnp.full((PART, plan.K), 0.0, jnp.float32), plgpu.Layout.WGMMA
        ),
        plgpu.layout_cast(jnp.full((PART,), LOWEST, jnp.float32), _ROW),
        plgpu.layout_cast(jnp.full((PART,), 0.0, jnp.float32), _ROW),
    )
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(barriers.k.at[slot_of(0)]))
    pl.when(offset == 1)(take_turn)
    carry = lax.fori_loop(0, steps, attend, carry)
    if tiles.parts > 1:
        pl.when(offset == 0)(take_turn)
    return carry
