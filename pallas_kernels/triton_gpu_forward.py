"""The forward kernel in Triton, called by `triton_gpu`, which alone imports this file."""

import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_gpu_logits, triton_gpu_plan


def run(plan, operands, selection, capability):
    """Returns out_BTHK in the operands' dtype, and lse_BHT; padded."""
    q_BTHK = operands.q_BTHK
    return triton_gpu_plan.call(
        attend,
        plan,
        (*operands, selection.block_id_BGQJ, selection.count_BGQ),
        [
            triton_gpu_plan.shape(q_BTHK.dtype, *q_BTHK.shape),
            triton_gpu_plan.shape(jnp.float32, plan.B, plan.H, plan.T),
        ],
        (plan.Q * plan.parts, plan.B * plan.G),
        capability,
    )


@triton.jit
def attend(
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
    out_BTHK_ptr,
    lse_BHT_ptr,
    plan: tl.constexpr,
):
    """One part of a list's rows, by a running softmax over its key blocks."""
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
    ptrs = (
        token_mask_BGQJ_ptr,
        bias_BGTJ_ptr,
        segment_query_BT_ptr,
        segment_key_BS_ptr,
    )
    M: tl.constexpr = plan.rows
    K: tl.constexpr = plan.K
    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, K), tl.float32)
    for j in range(0, count, plan.blocks):
        tile = triton_gpu_logits.take_blocks(block_id_BGQJ_ptr, of_list, j, count, plan)
        position = triton_gpu_logits.place_blocks(tile[2], plan)
        of_key, of_key_head = triton_gpu_logits.place_keys(pair, position, plan)
        k = triton_gpu_logits.load_heads(k_BSGK_ptr, of_key_head, plan)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = triton_gpu_logits.weigh_tile(s, rows, tile, of_list, of_key, ptrs, plan)
        new = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new) * plan.to_bits
        p = tl.exp2(s * plan.to_bits - base[:, None])
        shrink = tl.exp2(highest * plan.to_bits - base)
        total = total * shrink + tl.sum(p, 1)
        v = triton_gpu_logits.load_heads(v_BSGK_ptr, of_key_head, plan)
        out = out * shrink[:, None]
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        highest = new
    empty = total == 0.0
    out /= tl.where(empty, 1.0, total)[:, None]
    lse = (highest * plan.to_bits + tl.log2(total)) / triton_gpu_plan.LOG2E
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(lse_BHT_ptr + of_head, lse, mask=is_row)
    triton_gpu_logits.store_heads(out_BTHK_ptr, of_row, out, is_row, plan)
