"""Points as an index keeps them, and as they are reckoned with. Called by all that makes or reads bookmarks.

Chapters are few and stay float32, though they may be compared in less. They and links are made of what is kept, so that
growing an index and building it at once still give the same.
"""

import jax.numpy as jnp
from jax import lax

from bsa.index import settings
from pallas_kernels import mosaic_gpu_search

FLOAT8_LARGEST = 448.0


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


def to_float8(x):
    """Float32 numbers as float8_e4m3fn: four bits of a number from 1/64 to 448, the largest."""
    x = jnp.clip(x, -FLOAT8_LARGEST, FLOAT8_LARGEST)
    # XLA may leave out a conversion there and back, but not across a barrier.
    return lax.optimization_barrier(x.astype(jnp.float8_e4m3fn))


def compared(index: settings.IndexSettings, level: int) -> str:
    """What queries and points of a level, 0 of bookmarks, are rounded to when they are compared: float32, bfloat16 or float8."""
    if level and index.chapter_store == "float8":
        return "float8"
    return "bfloat16" if index.store == "bfloat16" else "float32"


def round_point(point, compared: str):
    """Float32 points [..., K] as they are compared, see `compared`."""
    if compared == "float8":
        return to_float8(point).astype(jnp.float32)
    return to_bfloat16(point) if compared == "bfloat16" else point


def round_query(q, compared: str):
    """Float32 queries [..., K] as they are compared; in float8 each times a power of two that brings it near the largest."""
    if compared == "float8":
        rounded, scale = mosaic_gpu_search.to_float8(q)
        rounded = lax.optimization_barrier(rounded)
        return rounded.astype(jnp.float32) * scale[..., None]
    return to_bfloat16(q) if compared == "bfloat16" else q


def unpack(point, log_count, scale=None):
    """A node of the index: its points in float32, and log_count as it is."""
    point = point.astype(jnp.float32)
    return (point if scale is None else point * scale[..., None]), log_count
