"""The decoding kernel for Hopper GPUs in Pallas Mosaic GPU, called by `mosaic_gpu_decode`.

The thread blocks of a cluster share a list: piece p of them reads key tiles p, p + pieces,
and so on, so that no entry's piece depends on how long the list is. A producer warpgroup
reads block ids where they lie and gathers key tiles; a consumer warpgroup attends as in
`mosaic_gpu_forward`. Then all write what they found, wait for each other, and the first
joins the pieces: attention once more, whose keys are the pieces' rows and whose logits are
their lse, in the same order every time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    mosaic_gpu_decode_plan,
    mosaic_gpu_forward,
    mosaic_gpu_gather,
    mosaic_gpu_logits,
    mosaic_gpu_matmul,
    mosaic_gpu_plan,
)

PART = mosaic_gpu_plan.PART


def run(plan, inputs, interpret):
    """Attends.

    Returns:
        out_BTGHK, and the lse of all parts' rows, [B, G, parts, 64], natural log.
    """
    arrays, tree = jax.tree.flatten(inputs)
    lists = (plan.B, plan.G, plan.parts)
    handed_over = (*lists, plan.pieces * plan.piece_rows)
    is_cut = plan.pieces > 1
    shapes = mosaic_gpu_decode_plan.Outputs(
        jax.ShapeDtypeStruct(inputs.q_BTGHK.shape, plan.dtype),
        jax.ShapeDtypeStruct((*lists, PART), jnp.float32),
        jax.ShapeDtypeStruct((*handed_over, plan.K), plan.dtype) if is_cut else None,
        jax.ShapeDtypeStruct(handed_over, jnp.float32) if is_cut else None,
    )
    out_types, out_tree = jax.tree.flatten(shapes)

    def attend_decode(*refs):
        *refs, shared, barriers = refs
        outputs = out_tree.unflatten(refs[len(arrays) :])
        _run_thread(
            plan, tree.unflatten(refs[: len(arrays)]), outputs, shared, barriers
        )

    kernel = plgpu.kernel(
        attend_decode,
        out_type=tuple(out_types),
        scratch_types=(
            mosaic_gpu_decode_plan.shared_types(plan),
            mosaic_gpu_decode_plan.barrier_types(plan),
        ),
        grid=(plan.B * plan.G * plan.parts,),
        grid_names=("program",),
        cluster=(plan.pieces,),
        cluster_names=("piece",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )
    return kernel(*arrays)[:2]


def _run_thread(plan, inputs, outputs, shared, barriers):
    """What one warpgroup does."""
    place = mosaic_gpu_decode_plan.locate(plan)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _consumer():
        plgpu.set_max_registers(plan.tiles.consumer_registers, action="increase")
        _consume(plan, inputs, outputs, shared, barriers, place)

    @pl.when(warpgroup == 1)
    def _producer():
        plgpu.set_max_registers(plan.tiles.producer_registers, action="decrease")
        _produce(plan, inputs, shared, barriers, place)


def _produce(plan, inputs, shared, barriers, place):
    """Copies key tiles as fast as the consumer releases stages."""
    stages, C = plan.tiles.stages, plan.key_block

    def read_ids(step):
        entry = mosaic_gpu_decode_plan.first_entry(plan, place, step)
        return mosaic_gpu_decode_plan.read_list(
            plan, inputs.block_id_BGQJ, place, entry
        )

    def copy_tile(step, ids):
        # The ids of the next tile are on their way while this one's copies start.
        next_ids = read_ids(step + 1)
        slot = lax.rem(step, jnp.int32(stages))
        entry = mosaic_gpu_decode_plan.first_entry(plan, place, step)
        # The last tile repeats a listed block, which the consumer masks.
        listed = [jnp.where(entry + p < count, x, ids[0]) for p, x in enumerate(ids)]
        for gmem, smem, full, free in (
            (inputs.k_BSGK, shared.k, barriers.k, barriers.k_free),
            (inputs.v_BSGK, shared.v, barriers.v, barriers.v_free),
        ):
            pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for p, block_id in enumerate(listed):
                plgpu.copy_gmem_to_smem(
                    gmem.at[place.b, pl.ds(block_id * C, C), place.g],
                    smem.at[slot, pl.ds(p * C, C)],
                    full.at[slot],
                )
        return next_ids

    count, steps = mosaic_gpu_decode_plan.measure(plan, inputs, place)
    # Else the compiler loads the first ids only once the list's length has come.
    count, steps, first_ids = lax.optimization_barrier(
        (count, steps, read_ids(jnp.int32(0)))
    )
    lax.fori_loop(0, steps, copy_tile, first_ids)
    mosaic_gpu_gather.drain(stages, steps, [barriers.k_free, barriers.v_free])


def _consume(plan, inputs, outputs, shared, barriers, place):
    """Attends with a part to a piece of its list, and joins what the pieces found."""
    _copy_queries(plan, inputs, shared, barriers, place)
    rows = mosaic_gpu_decode_plan.describe_rows(plan, inputs, place)
    sums = _attend(plan, inputs, shared, barriers, place, rows)
    if plan.pieces == 1:
        _store(plan, outputs, shared, place, _finish(sums))
        return
    _hand_over(plan, outputs, shared, place, rows, _finish(sums))
    plgpu.barrier_arrive(barriers.written)
    # All stay until all have arrived here: an arrival needs the memory of who waits.
    plgpu.barrier_wait(barriers.written)

    @pl.when(place.piece == 0)
    def _join_and_store():
        sums = _join(plan, outputs, shared, barriers, place)
        _store(plan, outputs, shared, place, _finish(sums))


def _copy_queries(plan, inputs, shared, barriers, place):
    """Starts the copies of a part's queries. Rows without a unit keep what was there."""
    for rows, source, _ in mosaic_gpu_decode_plan.list_units(plan, place):
        plgpu.copy_gmem_to_smem(
            inputs.q_BTGHK.at[source], shared.q.at[rows], barriers.q
        )


def _attend(plan, inputs, shared, barriers, place, rows):
    """Online softmax of a part over a piece of its list: `_absorb`'s sums."""
    count, steps = mosaic_gpu_decode_plan.measure(plan, inputs, place)
    to_bits = plan.scale * mosaic_gpu_plan.LOG2E

    def attend(step, sums):
        slot = lax.rem(step, jnp.int32(plan.tiles.stages))
        entry = mosaic_gpu_decode_plan.first_entry(plan, place, step)
        ids = mosaic_gpu_decode_plan.read_list(plan, inputs.block_id_BGQJ, place, entry)
        words = None
        if plan.has_mask:
            words = mosaic_gpu_decode_plan.read_list(
                plan, inputs.token_mask_BGQJ, place, entry
            )
        plgpu.barrier_wait(barriers.k.at[slot])
        (s,) = mosaic_gpu_matmul.multiply(
            (shared.q, shared.k.at[slot].transpose((1, 0)))
        )
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        s = _mask(plan, s * to_bits, (entry, count, ids, words), rows)
        sums = _absorb(
            plan,
            sums,
            s,
            shared.v.at[slot],
            lambda: plgpu.barrier_wait(barriers.v.at[slot]),
        )
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        return sums

    plgpu.barrier_wait(barriers.q)
    return lax.fori_loop(0, steps, attend, _no_sums(plan))


def _mask(plan, s, entries, rows):
    """Puts -inf where a row may not read."""
    entry, count, ids, words = entries
    C, pieces = plan.key_block, []
    column = plgpu.broadcasted_iota(jnp.int32, (PART, C), 1, layout=plgpu.Layout.WGMMA)
    for p, piece in enumerate(mosaic_gpu_logits.split(plan, s)):
        first = jnp.where(entry + p < count, ids[p] * C, mosaic_gpu_logits.FAR)
        limit = rows.limit - first
        if plan.has_mask:
            limit = jnp.where((words[p] >> rows.token) & 1 == 1, limit, -1)
        read = column <= lax.broadcast_in_dim(limit, (PART, C), [0])
        pieces.append(jnp.where(read, piece, -jnp.inf))
    return pieces[0] if plan.blocks == 1 else jnp.concatenate(pieces, axis=1)


def _no_sums(plan):
    row = mosaic_gpu_logits.ROW
    return (
        mosaic_gpu_matmul.zeros(PART, plan.K, layout=plgpu.Layout.WGMMA),
        plgpu.layout_cast(
            jnp.full((PART,), mosaic_gpu_forward.LOWEST, jnp.float32), row
        ),
        mosaic_gpu_matmul.zeros(PART, layout=row),
    )


def _absorb(plan, sums, s, v_ref, wait_for_values):
    """Takes one more tile into the sums.

    Args:
        sums: of weighted values, the largest logit, and the sum of weights.
        s: logits in bits, [64, 64].
    """
    acc, maximum, total = sums
    largest = jnp.maximum(maximum, s.max(axis=1))
    decay = jnp.exp2(maximum - largest)
    p = jnp.exp2(s - lax.broadcast_in_dim(largest, s.shape, [0]))
    acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
    total = total * decay + p.sum(axis=1)
    p = p.astype(plan.dtype)
    acc, total, largest, p = lax.optimization_barrier((acc, total, largest, p))
    wait_for_values()
    (acc,) = mosaic_gpu_matmul.multiply_add(plan, [acc], [(p, v_ref)])
    return acc, largest, total


def _finish(sums):
    """Outputs in float32, and lse in bits."""
    acc, maximum, total = sums
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    acc *= lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
    lse = maximum + jnp.log(total) * mosaic_gpu_plan.LOG2E
    return acc, jnp.where(empty, -jnp.inf, lse)


def _hand_over(plan, outputs, shared, place, rows, results):
    """Copies a piece's results to where the first piece finds them, and waits."""
    out, lse = results
    # The join multiplies other rows by 0: what no unit has filled must be finite for that.
    is_real = lax.broadcast_in_dim(rows.is_real, out.shape, [0])
    shared.q[...] = jnp.where(is_real, out, 0.0).astype(plan.dtype)
    shared.lse[...] = lse
    plgpu.commit_smem()
    some = pl.ds(place.piece * plan.piece_rows, plan.piece_rows)
    first = pl.ds(0, plan.piece_rows)
    for staged, gmem in (
        (shared.q, outputs.piece_out),
        (shared.lse, outputs.piece_lse),
    ):
        plgpu.copy_smem_to_gmem(
            staged.at[first], gmem.at[place.b, place.g, place.part, some]
        )
    plgpu.wait_smem_to_gmem(0)


def _join(plan, outputs, shared, barriers, place):
    """`_absorb`'s sums over the pieces: a row reads the same row of each piece."""

    def join(step, sums):
        some = pl.ds(step * PART, PART)
        slot = lax.rem(step, jnp.int32(plan.tiles.stages))
        for gmem, smem in (
            (outputs.piece_out, shared.v.at[slot]),
            (outputs.piece_lse, shared.lse),
        ):
            plgpu.copy_gmem_to_smem(
                gmem.at[place.b, place.g, place.part, some], smem, barriers.joined
            )
        plgpu.barrier_wait(barriers.joined)
        lse = plgpu.load(shared.lse, layout=mosaic_gpu_logits.COLUMN)
        plgpu.commit_smem()  # Orders what was read before the copy that comes next.
        row, column = (
            plgpu.broadcasted_iota(
                jnp.int32, (PART, PART), x, layout=plgpu.Layout.WGMMA
            )
            for x in range(2)
        )
        is_same = row == (column & (plan.piece_rows - 1))
        s = jnp.where(is_same, lax.broadcast_in_dim(lse, is_same.shape, [1]), -jnp.inf)
        return _absorb(plan, sums, s, shared.v.at[slot], lambda: None)

    num_tiles = plan.pieces * plan.piece_rows // PART
    return lax.fori_loop(0, num_tiles, join, _no_sums(plan))


def _store(plan, outputs, shared, place, results):
    """Copies outputs and lse to where they belong, by way of shared memory."""
    out, lse = results
    shared.q[...] = out.astype(plan.dtype)
    shared.lse[...] = lse * (1 / mosaic_gpu_plan.LOG2E)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        shared.lse, outputs.lse_rows.at[place.b, place.g, place.part]
    )
    for rows, target, is_real in mosaic_gpu_decode_plan.list_units(plan, place):

        @pl.when(is_real)
        def _store_unit(rows=rows, target=target):
            plgpu.copy_smem_to_gmem(shared.q.at[rows], outputs.out_BTGHK.at[target])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
