"""Attention of the newest tokens on Hopper GPUs: few queries, long lists, many sequences.

The forward kernel with each list cut into pieces, so that a few sequences fill the card; the
pieces' outputs are merged by their lse. The heads that share a list fill the rows of a tile.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import (
    mosaic_gpu,
    mosaic_gpu_forward,
    mosaic_gpu_operands,
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
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    if selection.query_block != QUERY_BLOCK or selection.count_BGQ.shape[-1] != 1:
        raise ValueError(
            f"decoding needs one list for at most {QUERY_BLOCK} tokens, not "
            f"{selection.count_BGQ.shape[-1]} for blocks of {selection.query_block}"
        )
    rules = options.Options(scale=float(scale))
    mosaic_gpu.check(q_BTHK, selection, rules, interpret)
    pieces = tiles.hopper_pieces(B * G, selection.block_id_BGQJ.shape[-1])
    first_id_BQ = jnp.repeat(position_B.astype(jnp.int32)[:, None], pieces, axis=1)
    plan, operands, _ = mosaic_gpu_operands.prepare(
        tiles.hopper_forward,
        rules,
        interpret,
        (q_BTHK, k_BSGK, v_BSGK, None),
        (_cut(selection, pieces), None, (first_id_BQ, jnp.zeros(1, jnp.int32))),
        pieces,
    )
    out, lse_rows = mosaic_gpu_forward.run(plan, operands, interpret)
    lse = mosaic_gpu_operands.from_rows(plan, lse_rows)
    out = out.reshape(B, pieces, QUERY_BLOCK, H, plan.K)[:, :, :T, :, :K]
    lse = lse.reshape(B, H, pieces, QUERY_BLOCK)[..., :T]
    return _merge(out, lse)


def _cut(selection, pieces):
    """One list as `pieces` lists of equal length, the last of them perhaps padded."""
    *lead, _, J = selection.block_id_BGQJ.shape
    length = -(-J // pieces)

    def cut(x_BGQJ, fill):
        if x_BGQJ is None:
            return None
        x_BGQJ = mosaic_gpu_operands.pad(x_BGQJ, {3: pieces * length}, fill)
        return x_BGQJ.reshape(*lead, pieces, length)

    before = jnp.arange(pieces, dtype=jnp.int32) * length
    return dataclasses.replace(
        selection,
        block_id_BGQJ=cut(selection.block_id_BGQJ, -1),
        count_BGQ=jnp.clip(selection.count_BGQ - before, 0, length),
        token_mask_BGQJ=cut(selection.token_mask_BGQJ, 0),
    )


def _merge(out, lse):
    """Joins the pieces of lists.

    Args:
        out: [B, pieces, T, H, K].
        lse: [B, H, pieces, T].
    """
    largest = lse.max(2, keepdims=True)
    weight = jnp.exp(lse - jnp.where(largest > -jnp.inf, largest, 0.0))
    total = weight.sum(2)
    lse_BHT = jnp.log(total) + largest[:, :, 0]
    share = weight / jnp.where(total == 0.0, 1.0, total)[:, :, None]
    out_BTHK = jnp.einsum("BPTHK,BHPT->BTHK", out.astype(jnp.float32), share)
    return out_BTHK.astype(out.dtype), jnp.where(total == 0.0, -jnp.inf, lse_BHT)
