"""Rotary position embedding (Su et al., 2021). Called by `attention`."""

import jax.numpy as jnp

from pallas_kernels import shapes


def rotate(x_BTHK, position_BT, theta: float):
    """Turns the pair (i, i + K/2) of every head by position * theta**(-2i/K) radians; computed in float32.

    Args:
        position_BT: int32; only differences matter to attention.
        theta: base of the wavelengths.
    """
    sizes = shapes.check(x_BTHK=x_BTHK, position_BT=position_BT)
    half = sizes["K"] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x_BTHK.dtype)
