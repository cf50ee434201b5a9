"""Gradients of keys and values in Triton, called by `triton_gpu`, which alone imports this file.

A program takes a piece of a row of `transpose.Readers`: one key block, and some of the query
blocks that read it. What pieces make is added up in one order, without atomics, so the same
inputs give the same bits.
"""

import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import transpose, triton_gpu_logits, triton_gpu_plan


def run(plan, operands, cotangents, selection, capability):
    """Differentiates with respect to keys and values.

    Args:
        plan: with key tiles of one block.
        cotangents: d_out_BTHK, lse_BHT as powers of two, and delta_BHT; padded.
    Returns:
        dk_BSGK and dv_BSGK, padded.
    """
    readers = transpose.transpose(
        selection.block_id_BGQJ, selection.count_BGQ, plan.num_blocks
    )
    pieces = transpose.cut(readers, plan.piece_readers)
    sum_shape = (plan.B, plan.G, plan.num_pieces, plan.key_block, plan.K)
    sums = triton_gpu_plan.call(
        attend_dkv,
        plan,
        (*operands, *cotangents, readers.entry)
        + (pieces.block_id, pieces.first, pieces.last),
        [triton_gpu_plan.shape(jnp.float32, *sum_shape)] * 2,
        (plan.num_pieces, plan.B * plan.G),
        capability,
    )
    k_BSGK = operands.k_BSGK
    return triton_gpu_plan.call(
        add_pieces,
        plan,
        (*sums, pieces.first_piece),
        [triton_gpu_plan.shape(k_BSGK.dtype, *k_BSGK.shape)] * 2,
        (plan.num_blocks, plan.B * plan.G),
        capability,
    )


@triton.jit
def attend_dkv(
    q_BTHK_ptr,
    k_BSGK_ptr,
    v_BSGK_ptr,
    first_position_BQ_ptr,
    token_mask_BGQJ_ptr,
    bias_BGTJ_ptr,
    segment_query_BT_ptr,
    segment_key_BS_ptr,
    d_out_BTHK_ptr,
    lse_BHT_ptr,
    delta_BHT_ptr,
    entry_BGE_ptr,
    block_id_BGP_ptr,
    first_BGP_ptr,
    last_BGP_ptr,
    dk_BGPCK_ptr,
    dv_BGPCK_ptr,
    plan: tl.constexpr,
):
    """One key block, and a piece of its readers."""
    pair = tl.program_id(1)
    piece = pair * tl.num_programs(0) + tl.program_id(0)
    first, last = tl.load(first_BGP_ptr + piece), tl.load(last_BGP_ptr + piece)
    block_id = tl.load(block_id_BGP_ptr + piece)
    is_piece = block_id < plan.num_blocks  # Else it has no readers.
    block_id = tl.minimum(block_id, plan.num_blocks - 1)
    position = block_id * plan.key_block + tl.arange(0, plan.key_block)
    of_key, of_key_head = triton_gpu_logits.place_keys(pair, position, plan)
    k = triton_gpu_logits.load_heads(k_BSGK_ptr, of_key_head, plan)
    v = triton_gpu_logits.load_heads(v_BSGK_ptr, of_key_head, plan)
    C: tl.constexpr = plan.key_block
    K: tl.constexpr = plan.K
    dk, dv = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    of_entry = pair.to(tl.int64) * (plan.Q * plan.J)
    for step in range((last - first) * plan.parts):
        entry = tl.load(entry_BGE_ptr + of_entry + first + step // plan.parts)
        i, j = entry // plan.J, entry % plan.J
        token, limit, of_token, of_group, of_head, of_row = (
            triton_gpu_logits.place_rows(
                first_position_BQ_ptr, pair, i, step % plan.parts, plan
            )
        )
        q = triton_gpu_logits.load_heads(q_BTHK_ptr, of_row, plan)
        d_out = triton_gpu_logits.load_heads(d_out_BTHK_ptr, of_row, plan)
        lse = tl.load(lse_BHT_ptr + of_head)[None, :]
        delta = tl.load(delta_BHT_ptr + of_head)[None, :]
        word, bias, segments = 0, 0.0, (0, 0)
        if plan.has_mask:
            word = tl.load(token_mask_BGQJ_ptr + of_entry + entry)
        if plan.has_bias:
            bias = tl.load(bias_BGTJ_ptr + of_group * plan.J + j)[None, :]
        if plan.has_segments:
            segments = (
                tl.load(segment_query_BT_ptr + of_token)[None, :],
                tl.load(segment_key_BS_ptr + of_key)[:, None],
            )
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        s = triton_gpu_logits.weigh(
            *(s, limit[None, :], position[:, None], word, token[None, :]),
            *(bias, segments, plan),
        )
        p = tl.exp2(s * plan.to_bits - lse)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(d_out), input_precision="ieee") - delta)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    of_sum = piece.to(tl.int64) * plan.key_block + tl.arange(0, plan.key_block)
    is_key = is_piece & (position < plan.S)
    triton_gpu_logits.store_heads(dk_BGPCK_ptr, of_sum, dk * plan.scale, is_key, plan)
    triton_gpu_logits.store_heads(dv_BGPCK_ptr, of_sum, dv, is_key, plan)


@triton.jit
def add_pieces(
    dk_BGPCK_ptr,
    dv_BGPCK_ptr,
    first_piece_BGN_ptr,
    dk_BSGK_ptr,
    dv_BSGK_ptr,
    plan: tl.constexpr,
):
    """The pieces of one key block, in their order."""
    n, pair = tl.program_id(0), tl.program_id(1)
    first_piece_ptr = first_piece_BGN_ptr + pair * (tl.num_programs(0) + 1) + n
    first, last = tl.load(first_piece_ptr), tl.load(first_piece_ptr + 1)
    key = tl.arange(0, plan.key_block)
    C: tl.constexpr = plan.key_block
    K: tl.constexpr = plan.K
    dk, dv = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    for piece in range(first, last):
        of_piece = pair.to(tl.int64) * plan.num_pieces + piece
        of_sum = of_piece * plan.key_block + key
        dk += triton_gpu_logits.load_heads(dk_BGPCK_ptr, of_sum, plan)
        dv += triton_gpu_logits.load_heads(dv_BGPCK_ptr, of_sum, plan)
    _, of_key = triton_gpu_logits.place_keys(pair, n * plan.key_block + key, plan)
    everything = key >= 0
    triton_gpu_logits.store_heads(dk_BSGK_ptr, of_key, dk, everything, plan)
    triton_gpu_logits.store_heads(dv_BSGK_ptr, of_key, dv, everything, plan)
