"""Blocks chosen by their places alone, to compare with those that a query finds. Called by `route`."""

import jax.numpy as jnp

from bsa.index import settings
from pallas_kernels import shapes


def choose(open_blocks, num_groups: int, index: settings.IndexSettings):
    """The A blocks that a pattern gives each token beyond its local view.

    `strided`: every `stride`-th block before the window. `fixed`: the last block of every stretch of `stride` blocks of
    the document, the latest first (both Child et al., arXiv 1904.10509, in blocks). `random`: one block of each A-th
    of what is open, others for each head and each place of the window (BigBird, arXiv 2007.14062).

    Args:
        open_blocks: low_BT and high_BT, as `LocalView.open_blocks`.
        num_groups: G.
    Returns:
        choice_BGTA: int32 block ids, -1 where fewer are open.
    """
    low_BT, high_BT = open_blocks
    shapes.check(low_BT=low_BT, high_BT=high_BT)
    B, T = low_BT.shape
    low_BT1, high_BT1 = low_BT[..., None], high_BT[..., None]
    place_A = jnp.arange(index.A, dtype=jnp.int32)
    if index.route == "random":
        shape = B, num_groups, T, index.A
        num_BT1 = jnp.maximum(high_BT1 - low_BT1, 0)
        first = num_BT1 * place_A // index.A
        count = num_BT1 * (place_A + 1) // index.A - first
        head_G11 = jnp.arange(num_groups, dtype=jnp.int32)[:, None, None]
        key = (high_BT1[:, None] * num_groups + head_G11) * index.A + place_A
        drawn = _scramble(key) % jnp.maximum(count, 1)[:, None].astype(jnp.uint32)
        choice = (low_BT1 + first)[:, None] + drawn.astype(jnp.int32)
        return jnp.broadcast_to(jnp.where(count[:, None] > 0, choice, -1), shape)
    if index.route == "strided":
        choice = high_BT1 - (place_A + 1) * index.stride
    else:
        whole = (high_BT1 - low_BT1) // index.stride
        choice = low_BT1 + (whole - place_A) * index.stride - 1
    choice = jnp.where((choice >= low_BT1) & (choice < high_BT1), choice, -1)
    return jnp.broadcast_to(choice[:, None], (B, num_groups, T, index.A))


def _scramble(key):
    """uint32 that look drawn at random, equal for equal keys (Wellons' lowbias32)."""
    x = key.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
