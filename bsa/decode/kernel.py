"""A single token's attention to its lists by the Hopper kernel, which reads the cache where it lies. Called by `attend`."""

import dataclasses

import jax.numpy as jnp

from bsa.decode import blocks
from bsa.decode import cache as caches
from pallas_kernels import (
    dispatch,
    mosaic_gpu_decode,
    mosaic_gpu_operands,
    selection,
    shapes,
)


def can_read(q_BTHK, memory: caches.LayerCache, kind: str, implementation: str) -> bool:
    """Whether the kernel is wanted, and reads this memory: every block of the text, unquantised, at its own place.

    Args:
        kind: of layer; only bookmark layers and those that follow them keep all blocks and have lists.
        implementation: as in `dispatch.block_sparse_attention`.
    """
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    if dispatch.resolve(implementation) != "mosaic_gpu" or T > 1:
        return False
    if kind not in "bf" or memory.pages is not None or memory.host is not None:
        return False
    value = memory.k.value_BGNCK
    return (
        value.dtype in (jnp.bfloat16, jnp.float16)
        and value.shape[3] in mosaic_gpu_operands.BLOCKS
        and K in mosaic_gpu_operands.WIDTHS
    )


def read(
    q_BTHK,
    k: blocks.Blocks,
    v: blocks.Blocks,
    lists: selection.BlockSelection,
    position_B,
    scale: float,
):
    """Attention of one token a row to the blocks of its lists; arrays of the cache's size are neither moved nor copied.

    Args:
        lists: of single tokens: `query_block` is 1.
        position_B: int32, the tokens' places.
    Returns:
        out_BTHK.
    """
    sizes = shapes.check(q_BTHK=q_BTHK, value_BGNCK=k.value_BGNCK)
    B, G, N, C, K, H = (sizes[letter] for letter in "BGNCKH")

    # A row's heads lie apart in the cache, so each is a sequence to the kernel.
    def apart(x):
        return x.reshape(B * G, 1, *x.shape[2:])

    out, _ = mosaic_gpu_decode.attend(
        q_BTHK.reshape(B * G, 1, H // G, K),
        k.value_BGNCK.reshape(B * G, N * C, 1, K),
        v.value_BGNCK.reshape(B * G, N * C, 1, K),
        dataclasses.replace(
            lists,
            block_id_BGQJ=apart(lists.block_id_BGQJ),
            count_BGQ=apart(lists.count_BGQ),
            token_mask_BGQJ=apart(lists.token_mask_BGQJ),
            query_block=mosaic_gpu_decode.QUERY_BLOCK,
        ),
        jnp.repeat(position_B, G),
        scale=scale,
    )
    return out.reshape(q_BTHK.shape)
