"""Points as an index keeps them, and as they are reckoned with. Called by all that makes or reads bookmarks.

Chapters are few and stay float32. They and links are made of what is kept, so that growing an index and building it at
once still give the same.
"""

import jax.numpy as jnp
from jax import lax


def pack(point, store: str):
    """Points [..., R, K] in the precision of the store, and float32 scales [..., R] of int8 ones, else None.

    Args:
        store: one of `settings.STORES`; int8 rounds to 1/127 of a point's largest number.
    """
    if store == "int8":
        scale = jnp.abs(point).max(-1) / 127
        level = jnp.round(point / jnp.maximum(scale, 1e-30)[..., None])
        return level.astype(jnp.int8), scale
    if store == "bfloat16":
        point = to_bfloat16(point)
    return point.astype(store), None


def to_bfloat16(x):
    """Float32 numbers rounded to what bfloat16 holds. A conversion there and back XLA may leave out; this it may not."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def unpack(point, log_count, scale=None):
    """A node of the index: its points in float32, and log_count as it is."""
    point = point.astype(jnp.float32)
    return (point if scale is None else point * scale[..., None]), log_count
