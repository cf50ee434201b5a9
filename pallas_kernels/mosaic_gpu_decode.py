"""Attention of the newest tokens on Hopper GPUs: few queries, long lists, many sequences.

Fits a call to the kernel of `mosaic_gpu_pieces`, which reads queries, caches and lists where
they lie: one launch, unless head widths or lengths must be padded first.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import (
    mosaic_gpu,
    mosaic_gpu_decode_plan,
    mosaic_gpu_operands,
    mosaic_gpu_pieces,
    options,
    tiles,
)

QUERY_BLOCK = 16
"""Most query tokens of a sequence."""


def attend(q_BTHK, k_BSGK, v_BSGK, selection, position_B, *, scale, interpret=None):
    """Causal attention of each sequence's newest tokens over the blocks listed for them.

    Args:
        q_BTHK: bfloat16 or float16, at most `QUERY_BLOCK` tokens.
        k_BSGK, v_BSGK: caches; what lies after a query's position isn't read.
        selection: one list a sequence and key/value head, with `query_block=QUERY_BLOCK`.
        position_B: int32, of each sequence's first query token.
        scale: multiplies the logits.
        interpret: as in `mosaic_gpu.attend`.
    Returns:
        out_BTHK in q's dtype and lse_BHT in float32, natural log: 0 and -inf for a query
        that reads no key. Not differentiable.
    Raises:
        NotImplementedError: not a Hopper GPU, or sizes that the kernel lacks.
        ValueError: more than one list.
    """
    selection.check(q_BTHK, k_BSGK)
    B, T, H, K = q_BTHK.shape
    if selection.query_block != QUERY_BLOCK or selection.count_BGQ.shape[-1] != 1:
        raise ValueError(
            f"decoding needs one list for at most {QUERY_BLOCK} tokens, not "
            f"{selection.count_BGQ.shape[-1]} for blocks of {selection.query_block}"
        )
    mosaic_gpu.check(q_BTHK, selection, options.Options(scale=float(scale)), interpret)
    plan, inputs = _prepare(
        (q_BTHK, k_BSGK, v_BSGK), selection, position_B, scale, interpret
    )
    out_BTGHK, lse_rows = mosaic_gpu_pieces.run(plan, inputs, interpret)
    heads = H // plan.G
    lse_BGHT = _from_rows(plan, lse_rows)[:, :, :heads]
    return out_BTGHK[..., :heads, :K].reshape(q_BTHK.shape), lse_BGHT.reshape(B, H, T)


def _prepare(arrays, selection, position_B, scale, interpret):
    """The kernel's plan and inputs, padded where they must be."""
    q_BTHK, k_BSGK, v_BSGK = arrays
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    width = next(x for x in mosaic_gpu_operands.WIDTHS if x >= K)
    heads = H // G if H // G <= 8 else mosaic_gpu_operands.round_up(H // G, 8)
    if selection.key_block > mosaic_gpu_decode_plan.PART:
        selection, _ = mosaic_gpu_operands.halve_blocks(selection, None)
    J, C = selection.block_id_BGQJ.shape[-1], selection.key_block
    num_tiles = -(-J * C // mosaic_gpu_decode_plan.PART)
    processors = tiles.hopper_processors(jax.devices()[0])
    mask_BGQJ = selection.token_mask_BGQJ
    plan = mosaic_gpu_decode_plan.Plan(
        B=B,
        T=T,
        H=G * heads,
        G=G,
        K=width,
        J=J,
        num_keys=S,
        key_block=C,
        dtype=jnp.dtype(q_BTHK.dtype),
        scale=float(scale),
        has_mask=mask_BGQJ is not None,
        pieces=tiles.hopper_pieces(B * G, num_tiles, processors),
        tiles=tiles.hopper_decode(width),
        interpreted=bool(interpret),
    )
    keys = mosaic_gpu_operands.round_up(S, C)
    q_BTGHK = q_BTHK.reshape(B, T, G, H // G, K)
    inputs = mosaic_gpu_decode_plan.Inputs(
        q_BTGHK=mosaic_gpu_operands.pad(q_BTGHK, {3: heads, 4: width}),
        k_BSGK=mosaic_gpu_operands.pad(k_BSGK, {1: keys, 3: width}),
        v_BSGK=mosaic_gpu_operands.pad(v_BSGK, {1: keys, 3: width}),
        block_id_BGQJ=selection.block_id_BGQJ,
        count_BGQ=selection.count_BGQ,
        token_mask_BGQJ=jax.lax.bitcast_convert_type(mask_BGQJ, jnp.int32)
        if plan.has_mask
        else None,
        position_B=position_B.astype(jnp.int32),
    )
    return plan, inputs


def _from_rows(plan, lse_rows):
    """The lse of rows, [B, G, parts, 64], as lse_BGHT of H/G heads."""
    units = lse_rows.reshape(plan.B, plan.G, -1, plan.unit_rows)[:, :, : plan.units]
    lse = units.reshape(plan.B, plan.G, plan.T, -1)[..., : plan.heads]
    return lse.swapaxes(2, 3)
