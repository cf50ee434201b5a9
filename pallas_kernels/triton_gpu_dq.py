"""Gradients of queries and bias in Triton, called by `triton_gpu`, which alone imports this file.

Walks over the lists as the forward pass does and recomputes the weights from the lse. No sum
is shared between programs, so the same inputs give the same bits.
"""

import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_gpu_logits, triton_gpu_plan


def run(plan, operands, cotangents, selection, capability):
    """Differentiates with respect to queries and bias.

    Args:
        cotangents: d_out_BTHK, lse_BHT as powers of two, and delta_BHT; padded.
    Returns:
        dq_BTHK, padded; and the gradient of the bias before the sum over a group's heads,
        float32[B, H, T, J], unwritten past the end of a list, or None.
    """
    q_BTHK = operands.q_BTHK
    dbias_shape = (plan.B, plan.H, plan.T, plan.J) if plan.has_bias else (1,)
    dq_BTHK, dbias_BHTJ = triton_gpu_plan.call(
        attend_dq,
        plan,
        (*operands, selection.block_id_BGQJ, selection.count_BGQ, *cotangents),
        [
            triton_gpu_plan.shape(q_BTHK.dtype, *q_BTHK.shape),
            triton_gpu_plan.shape(jnp.float32, *dbias_shape),
        ],
        (plan.Q * plan.parts, plan.B * plan.G),
        capability,
    )
    return dq_BTHK, dbias_BHTJ if plan.has_bias else None


@triton.jit
def attend_dq(
    q_BTHK_ptr,
    k_BSGK_ptr,
    v_BSGK_ptr,
    first_position_BQ_ptr,
    token_mask_BGQJ_ptr,
    bias_BGTJ_ptr,
    segment_query_BT_ptr,
    segment_key_BS_ptr,
    block_id_BGQJ_ptr,
    count_BGQ_ptr,
    d_out_BTHK_ptr,
    lse_BHT_ptr,
    delta_BHT_ptr,
    dq_BTHK_ptr,
    dbias_BHTJ_ptr,
    plan: tl.constexpr,
):
    """One part of a list's rows."""
    i = tl.program_id(0) // plan.parts
    part = tl.program_id(0) % plan.parts
    pair = tl.program_id(1)
    token, limit, of_token, of_group, of_head, of_row = triton_gpu_logits.place_rows(
        first_position_BQ_ptr, pair, i, part, plan
    )
    is_row = triton_gpu_logits.is_row(part, plan)
    rows = (token, limit, of_token, of_group)
    of_list = (pair * plan.Q + i).to(tl.int64) * plan.J
    count = tl.load(count_BGQ_ptr + pair * plan.Q + i)
    q = triton_gpu_logits.load_heads(q_BTHK_ptr, of_row, plan)
    d_out = triton_gpu_logits.load_heads(d_out_BTHK_ptr, of_row, plan)
    lse = tl.load(lse_BHT_ptr + of_head)[:, None]
    delta = tl.load(delta_BHT_ptr + of_head)[:, None]
    ptrs = (
        token_mask_BGQJ_ptr,
        bias_BGTJ_ptr,
        segment_query_BT_ptr,
        segment_key_BS_ptr,
    )
    M: tl.constexpr = plan.rows
    K: tl.constexpr = plan.K
    dq = tl.zeros((M, K), tl.float32)
    for j in range(0, count, plan.blocks):
        tile = triton_gpu_logits.take_blocks(block_id_BGQJ_ptr, of_list, j, count, plan)
        position = triton_gpu_logits.place_blocks(tile[2], plan)
        of_key, of_key_head = triton_gpu_logits.place_keys(pair, position, plan)
        k = triton_gpu_logits.load_heads(k_BSGK_ptr, of_key_head, plan)
        v = triton_gpu_logits.load_heads(v_BSGK_ptr, of_key_head, plan)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = triton_gpu_logits.weigh_tile(s, rows, tile, of_list, of_key, ptrs, plan)
        p = tl.exp2(s * plan.to_bits - lse)
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta)
        if plan.has_bias:
            of_block = tl.reshape(ds, plan.rows, plan.blocks, plan.key_block)
            tl.store(
                dbias_BHTJ_ptr + of_head[:, None] * plan.J + tile[0][None, :],
                tl.sum(of_block, 2),
                mask=is_row[:, None] & tile[1][None, :],
            )
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    triton_gpu_logits.store_heads(dq_BTHK_ptr, of_row, dq * plan.scale, is_row, plan)
