"""Block-sparse attention on TPUs: fits a call to the kernels' layouts, and joins their gradients.

The kernels are written in Pallas. They have been interpreted, and compiled for v5e, v5p,
v6e and TPU7x; they never ran on one, so "auto" doesn't choose them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    closure,
    mosaic_tpu_dkv,
    mosaic_tpu_dq,
    mosaic_tpu_forward,
    mosaic_tpu_logits,
    mosaic_tpu_plan,
    tiles,
)

KEY_BLOCKS = (16, 32, 64, 128)
"""Key blocks that fill tiles, tokens."""
QUERY_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Query blocks, tokens; those between are padded."""
WIDTHS = (64, 128, 256)
"""Head widths; smaller ones are padded with zeros."""
MAX_LIST = 4096
"""Entries of a list that fit in SMEM beside their masks and the next list."""
INSTEAD = "use implementation='xla' (any device) or 'reference' (small inputs)"


def attend(
    q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, options, interpret=False
):
    """Computes `dispatch.block_sparse_attention` on a TPU. float16 is computed in float32.

    Args:
        interpret: `pltpu.InterpretParams()` runs on any device, slowly.
    Raises:
        NotImplementedError: not a TPU, or sizes or options that the kernels lack.
    """
    if not interpret and not pltpu.is_tpu_device():
        raise NotImplementedError(
            f"mosaic_tpu needs a TPU, not {jax.devices()[0].device_kind}: {INSTEAD}"
        )
    _check_call(q_BTHK, selection, options)
    dtype = q_BTHK.dtype
    if dtype == jnp.float16:
        q_BTHK, k_BSGK, v_BSGK = (
            x.astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGK)
        )
    offset = jnp.append(
        jnp.broadcast_to(jnp.asarray(options.query_offset, jnp.int32), q_BTHK.shape[0]),
        jnp.asarray(options.key_offset, jnp.int32),
    )
    rules = dataclasses.replace(options, query_offset=0, key_offset=0)
    out_BTHK, lse_BHT = _attend(
        (rules, interpret),
        (q_BTHK, k_BSGK, v_BSGK, bias_BGTJ),
        (selection, segment_ids, offset),
    )
    return out_BTHK.astype(dtype), lse_BHT


def _check_call(q_BTHK, selection, options):
    """Raises NotImplementedError for a call that the kernels can't compute."""
    K, J = q_BTHK.shape[-1], selection.block_id_BGQJ.shape[-1]
    if K > WIDTHS[-1]:
        raise NotImplementedError(
            f"mosaic_tpu has heads of at most {WIDTHS[-1]}, not K={K}: {INSTEAD}"
        )
    if J > MAX_LIST:
        raise NotImplementedError(
            f"mosaic_tpu has lists of at most {MAX_LIST} entries, not J={J}: {INSTEAD}"
        )
    if selection.query_block > QUERY_BLOCKS[-1]:
        raise NotImplementedError(
            f"mosaic_tpu has query blocks of at most {QUERY_BLOCKS[-1]} tokens, not "
            f"query_block={selection.query_block}: {INSTEAD}"
        )
    if selection.key_block not in KEY_BLOCKS:
        raise NotImplementedError(
            f"mosaic_tpu has key blocks of {KEY_BLOCKS} tokens, not "
            f"key_block={selection.key_block}: {INSTEAD}"
        )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    score = jax.ShapeDtypeStruct((), jnp.float32)
    for name, examples in (("score_mod", (score,)), ("mask_mod", ())):
        mod = getattr(options, name)
        _, (arrays, _) = closure.convert(mod, *examples, *[scalar] * 4)
        if arrays:
            raise NotImplementedError(
                f"mosaic_tpu can't read the arrays that {name} closes over: {INSTEAD}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, differentiated, others):
    """Lays out the arrays, runs the kernel, and undoes the layout."""
    return _forward(static, differentiated, others)[0]


def _forward(static, differentiated, others):
    """Saves the inputs, the output, and lse as the kernel lays it out."""
    T, K = differentiated[0].shape[1::2]
    plan, operands = _prepare(static, differentiated, others)
    out, lse = mosaic_tpu_forward.run(plan, operands)
    out_BTHK = mosaic_tpu_plan.from_rows(plan, out, T)[..., :K]
    lse_BTH = mosaic_tpu_plan.from_rows(plan, lse.swapaxes(2, 3), T)[..., 0]
    results = (out_BTHK, lse_BTH.swapaxes(1, 2))
    return results, (differentiated, others, out_BTHK, lse)


def _backward(static, saved, cotangents):
    """dQ by the lists, dK and dV by the lists turned round."""
    differentiated, others, out_BTHK, lse = saved
    q_BTHK, k_BSGK, _, bias_BGTJ = differentiated
    dout_BTHK, dlse_BHT = cotangents
    (T, _, K), S = q_BTHK.shape[1:], k_BSGK.shape[1]
    plan, operands = _prepare(static, differentiated, others)
    out, dout = (
        mosaic_tpu_plan.to_rows(plan, mosaic_tpu_plan.pad(x, {3: plan.K}))
        for x in (out_BTHK, dout_BTHK)
    )
    dlse = mosaic_tpu_plan.to_rows(plan, dlse_BHT.swapaxes(1, 2)[..., None])
    shift = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    shift = shift[:, :, None] - dlse.swapaxes(2, 3)
    stats = jnp.concatenate([jnp.where(lse == -jnp.inf, 0.0, lse), shift], axis=2)

    dq, dbias = mosaic_tpu_dq.run(plan, operands, dout, stats)
    dk, dv = mosaic_tpu_dkv.run(plan, operands, others[0], dout, stats)
    dq_BTHK = mosaic_tpu_plan.from_rows(plan, dq, T)[..., :K]
    dk_BSGK, dv_BSGK = (
        mosaic_tpu_plan.from_key_blocks(plan, x, S, K) for x in (dk, dv)
    )
    dbias_BGTJ = None
    if bias_BGTJ is not None:
        J = bias_BGTJ.shape[-1]
        dbias_BGTJ = mosaic_tpu_plan.from_bias_rows(plan, dbias, T, J)
    return (dq_BTHK, dk_BSGK, dv_BSGK, dbias_BGTJ), None


_attend.defvjp(_forward, _backward)


def _prepare(static, differentiated, others):
    """The plan of a call, and the operands of the kernels that follow its lists."""
    (rules, interpret), (q_BTHK, k_BSGK, v_BSGK, bias_BGTJ) = static, differentiated
    selection, segment_ids, offset = others
    (B, _, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    sizes = tiles.INTERPRETED_TPU if interpret else tiles.tpu(pltpu.get_tpu_info())
    J = selection.block_id_BGQJ.shape[-1]
    tokens = next(x for x in QUERY_BLOCKS if x >= selection.query_block)
    blocks = max(1, sizes.keys // selection.key_block)
    per_register = mosaic_tpu_plan.LANES // tokens if bias_BGTJ is not None else 1
    plan = mosaic_tpu_plan.Plan(
        B=B,
        H=H,
        G=G,
        K=next(x for x in WIDTHS if x >= K),
        Q=selection.count_BGQ.shape[-1],
        # Lists end at whole tiles, and biases at whole registers.
        J=mosaic_tpu_plan.round_up(J, max(blocks, per_register)),
        N=-(-S // selection.key_block),
        query_block=selection.query_block,
        key_block=selection.key_block,
        tokens=tokens,
        num_keys=S,
        dtype=jnp.dtype(q_BTHK.dtype),
        scale=rules.scale,
        causal=rules.causal,
        score_mod=rules.score_mod,
        mask_mod=rules.mask_mod,
        has_mask=selection.token_mask_BGQJ is not None,
        has_bias=bias_BGTJ is not None,
        has_segments=segment_ids is not None,
        tiles=sizes,
        interpret=interpret,
    )
    query_BT, key_BS = (None, None) if segment_ids is None else segment_ids
    lists = _lists(plan, selection)
    width = {3: plan.K}
    bias_rows = mosaic_tpu_plan.to_bias_rows(plan, _hide(bias_BGTJ))
    operands = mosaic_tpu_forward.Operands(
        lists=lists,
        next_lists=lists,
        offset=offset,
        q=mosaic_tpu_plan.to_rows(plan, mosaic_tpu_plan.pad(q_BTHK, width)),
        k=mosaic_tpu_plan.to_key_blocks(plan, mosaic_tpu_plan.pad(k_BSGK, width)),
        v=mosaic_tpu_plan.to_key_blocks(plan, mosaic_tpu_plan.pad(v_BSGK, width)),
        segment_query=mosaic_tpu_plan.to_segment_rows(plan, query_BT),
        segment_key=mosaic_tpu_plan.to_segment_blocks(plan, key_BS),
        bias=mosaic_tpu_plan.fold_lanes(bias_rows),
    )
    return plan, operands


def _lists(plan, selection):
    """`Operands.lists` of the forward kernel. Padding repeats a listed block."""
    block_id_BGQJ, count_BGQ = selection.block_id_BGQJ, selection.count_BGQ
    listed_BGQJ = jnp.arange(block_id_BGQJ.shape[-1]) < count_BGQ[..., None]
    block_id_BGQJ = jnp.where(listed_BGQJ, block_id_BGQJ, block_id_BGQJ[..., :1])
    more = [(0, 0)] * 3 + [(0, plan.J - block_id_BGQJ.shape[-1])]
    entries = [jnp.pad(block_id_BGQJ, more, mode="edge")]
    if plan.has_mask:
        mask_BGQJ = jax.lax.bitcast_convert_type(selection.token_mask_BGQJ, jnp.int32)
        entries.append(jnp.pad(mask_BGQJ, more))
    own_BGQ = jnp.broadcast_to(jnp.arange(plan.Q, dtype=jnp.int32), count_BGQ.shape)
    return mosaic_tpu_plan.write_lists(count_BGQ, own_BGQ, *entries)


def _hide(bias_BGTJ):
    """Biases with a finite stand-in for -inf; None passes through."""
    if bias_BGTJ is None:
        return None
    return jnp.maximum(bias_BGTJ, mosaic_tpu_logits.HIDDEN)
