"""New tokens' attention to their lists by the Hopper kernels, which read the cache where it lies. Called by `attend`."""

import dataclasses

import jax.numpy as jnp

from bsa.decode import blocks, read
from bsa.decode import cache as caches
from pallas_kernels import (
    dispatch,
    mosaic_gpu_decode,
    mosaic_gpu_operands,
    selection,
    shapes,
)


def can_read(q_BTHK, memory: caches.LayerCache, kind: str, implementation: str) -> bool:
    """Whether the kernels are wanted, and read this memory: every block of the text, unquantised, at its own place.

    Args:
        kind: of layer; only bookmark layers and those that follow them keep all blocks and have lists.
        implementation: as in `dispatch.block_sparse_attention`.
    """
    if dispatch.resolve(implementation) != "mosaic_gpu":
        return False
    if kind not in "bf" or memory.pages is not None or memory.host is not None:
        return False
    value = memory.k.value_BGNCK
    return (
        value.dtype in (jnp.bfloat16, jnp.float16)
        and value.shape[3] in mosaic_gpu_operands.BLOCKS
        and q_BTHK.shape[-1] in mosaic_gpu_operands.WIDTHS
    )


def attend(
    q_BTHK,
    k: blocks.Blocks,
    v: blocks.Blocks,
    lists: selection.BlockSelection,
    position_BT,
    scale: float,
):
    """Attention of new tokens to the blocks of their lists; arrays of the cache's size are neither moved nor copied.

    Args:
        lists: of the query blocks that hold the tokens; of a single token a row, its own: `query_block` is 1.
        position_BT: int32, the tokens' places, which follow each other.
    Returns:
        out_BTHK.
    """
    sizes = shapes.check(q_BTHK=q_BTHK, value_BGNCK=k.value_BGNCK)
    B, G, N, C, K, H = (sizes[letter] for letter in "BGNCKH")

    # A row's heads lie apart in the cache, so each is a sequence to the kernels.
    def apart(x):
        return x.reshape(B * G, 1, *x.shape[2:])

    own_lists = dataclasses.replace(
        lists,
        block_id_BGQJ=apart(lists.block_id_BGQJ),
        count_BGQ=apart(lists.count_BGQ),
        token_mask_BGQJ=apart(lists.token_mask_BGQJ),
    )
    keys_and_values = [x.value_BGNCK.reshape(B * G, N * C, 1, K) for x in (k, v)]
    if lists.query_block == 1:
        block = mosaic_gpu_decode.QUERY_BLOCK
        out, _ = mosaic_gpu_decode.attend(
            q_BTHK.reshape(B * G, 1, H // G, K),
            *keys_and_values,
            dataclasses.replace(own_lists, query_block=block),
            jnp.repeat(position_BT[:, 0], G),
            scale=scale,
        )
        return out.reshape(q_BTHK.shape)
    q_BGQTHK, place_BQT = read.by_lists(q_BTHK, lists, position_BT)
    out, _ = dispatch.block_sparse_attention(
        q_BGQTHK.reshape(B * G, -1, H // G, K),
        *keys_and_values,
        own_lists,
        scale=scale,
        query_offset=jnp.repeat(place_BQT[:, 0, 0], G),
        implementation="mosaic_gpu",
    )
    return read.from_lists(out.reshape(q_BGQTHK.shape), lists, position_BT)
