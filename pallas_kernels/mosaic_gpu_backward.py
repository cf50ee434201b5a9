"""Backward pass on Hopper GPUs: what the kernels for dQ, dK and dV need, and what they make.

Called by `mosaic_gpu`, which saves the inputs, the output and the lse.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import extend

from pallas_kernels import (
    mosaic_gpu_dkv,
    mosaic_gpu_dq,
    mosaic_gpu_operands,
    mosaic_gpu_plan,
    mosaic_gpu_readers,
    mosaic_gpu_sum,
    tiles,
)

ELEMENTWISE = frozenset(
    {
        *(
            "add",
            "sub",
            "mul",
            "div",
            "rem",
            "neg",
            "abs",
            "sign",
            "max",
            "min",
            "round",
        ),
        *("exp", "exp2", "log", "tanh", "logistic", "sin", "cos", "sqrt", "rsqrt"),
        *(
            "square",
            "one_minus_square",
            "integer_pow",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and",
            "or",
        ),
        *("xor", "not", "select_n", "convert_element_type", "broadcast_in_dim"),
        *("copy", "jit", "reshard"),
    }
)
"""What the kernels compute of a `score_mod` and its derivative."""


def can_differentiate(score_mod):
    """Whether the kernels have what the derivative of a `score_mod` is made of."""
    if score_mod is None:
        return True

    def slope(s, *ids):
        return jax.jvp(lambda s: score_mod(s, *ids), (s,), (jnp.ones_like(s),))

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    jaxpr = jax.make_jaxpr(slope)(jax.ShapeDtypeStruct((), jnp.float32), *[scalar] * 4)
    return _primitives(jaxpr.jaxpr) <= ELEMENTWISE


def _primitives(jaxpr):
    """Names of the operations in a jaxpr and in those it calls."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    return names.union(*map(_primitives, extend.core.subjaxprs(jaxpr)))


def differentiate(rules, interpret, saved, cotangents):
    """Gradients of q, k, v and bias.

    Args:
        saved: differentiated and other inputs, as `mosaic_gpu` has them, out and lse.
        cotangents: of out and lse.
    """
    differentiated, others, out_BTHK, lse_BHT = saved
    q_BTHK, k_BSGK, _, bias_BGTJ = differentiated
    (_, T, _, K), S = q_BTHK.shape, k_BSGK.shape[1]
    plan, operands, selection = mosaic_gpu_operands.prepare(
        tiles.hopper_dq, rules, interpret, differentiated, others
    )
    operands = _add_cotangents(plan, operands, out_BTHK, lse_BHT, cotangents)
    dq_BTHK, dbias_rows = mosaic_gpu_dq.run(plan, operands, interpret)
    dk_BSGK, dv_BSGK = _differentiate_keys(plan, operands, selection, S, interpret)
    dbias_BGTJ = None
    if dbias_rows is not None:
        dbias_BGTJ = _sum_bias(plan, dbias_rows, selection, bias_BGTJ.shape)
    return (
        dq_BTHK[:, :T, :, :K],
        dk_BSGK[..., :K],
        dv_BSGK[..., :K],
        dbias_BGTJ,
    )


def _add_cotangents(plan, operands, out_BTHK, lse_BHT, cotangents):
    """Operands of the backward passes."""
    d_out_BTHK, d_lse_BHT = cotangents
    lse_BHT, delta_BHT = mosaic_gpu_operands.find_delta(
        out_BTHK, lse_BHT, d_out_BTHK, d_lse_BHT
    )
    lse_BHT *= mosaic_gpu_plan.LOG2E
    tokens = mosaic_gpu_operands.count_tokens(plan)
    return operands._replace(
        d_out_BTHK=mosaic_gpu_operands.pad(d_out_BTHK, {1: tokens, 3: plan.K}),
        lse_rows=mosaic_gpu_operands.to_rows(plan, lse_BHT, fill=jnp.inf),
        delta_rows=mosaic_gpu_operands.to_rows(plan, delta_BHT, fill=0.0),
    )


def _differentiate_keys(plan, operands, selection, S, interpret):
    """Gradients of k and v, of S keys of padded width."""
    sizes = tiles.hopper_dkv(plan.K)
    plan = dataclasses.replace(plan, tiles=sizes)
    length = max(1, sizes.piece_steps // plan.num_parts)
    num_tiles = -(-S // sizes.keys)
    mask_BGQJ = selection.token_mask_BGQJ
    if plan.has_mask:
        mask_BGQJ = jax.lax.bitcast_convert_type(mask_BGQJ, jnp.int32)
    readers = mosaic_gpu_readers.collect(
        *(plan, selection.block_id_BGQJ, selection.count_BGQ, mask_BGQJ),
        *(num_tiles, length),
    )
    keys = {1: num_tiles * sizes.keys}
    operands = operands._replace(
        k_BSGK=mosaic_gpu_operands.pad(operands.k_BSGK, keys),
        v_BSGK=mosaic_gpu_operands.pad(operands.v_BSGK, keys),
        segment_key_BS=mosaic_gpu_operands.pad(operands.segment_key_BS, keys),
        lists=None,
        token_mask_BGQJ=None,
    )
    sums = mosaic_gpu_dkv.run(plan, operands, readers, interpret)
    return [
        _sum_keys(plan, x, readers.first_piece_BGN, scale, interpret)[:, :S]
        for x, scale in zip(sums, (plan.scale, 1.0))
    ]


def _sum_keys(plan, x, first_piece_BGN, scale, interpret):
    """Adds up the pieces of `mosaic_gpu_dkv.run`. Returns [B, S, G, K]."""
    x_BGPRW = x.reshape(*x.shape[:3], -1, x.shape[-1])
    x_BGRW = mosaic_gpu_sum.sum_pieces(
        x_BGPRW, first_piece_BGN, scale, plan.dtype, interpret
    )
    if mosaic_gpu_dkv.is_narrow(plan):
        x_BGNKC = x_BGRW.reshape(plan.B, plan.G, -1, plan.K, plan.key_block)
        x_BGRW = x_BGNKC.swapaxes(3, 4).reshape(plan.B, plan.G, -1, plan.K)
    return x_BGRW.swapaxes(1, 2)


def _sum_bias(plan, dbias_rows, selection, shape):
    """Gradient of the bias, of a shape BGTJ, from that of each row."""
    listed_BGQJ = jnp.arange(plan.J) < selection.count_BGQ[..., None]
    dbias_rows = jnp.where(listed_BGQJ[..., None], dbias_rows, 0.0)
    dbias = mosaic_gpu_operands.split_rows(plan, dbias_rows)
    dbias_BGTJ = dbias.sum(-2).swapaxes(3, 4).reshape(plan.B, plan.G, -1, plan.J)
    # A list of halved blocks has two entries for one.
    split = selection.block_id_BGQJ.shape[-1] // shape[-1]
    dbias_BGTJ = dbias_BGTJ[:, :, : shape[2], : shape[3] * split]
    return dbias_BGTJ.reshape(*shape, split).sum(-1)
