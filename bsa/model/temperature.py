"""Attention's temperature in texts longer than those it was learned on: queries grow with position. Called by `layers`."""

import jax.numpy as jnp

from bsa.model import settings
from pallas_kernels import shapes

GLOBAL_KINDS = "dbf"
"""Layers that see everything before a token."""


def sharpness(position_BT, model: settings.ModelSettings, letter: int):
    """What a layer's queries are multiplied with: the more there is to read, the sharper attention.

    As Llama 4 has it, whose `floor_scale` is `temperature_tokens` and whose `attn_scale` is `temperature_gain`.

    Args:
        position_BT: int32, tokens since the beginning of the document.
        letter: index into the pattern.
    Returns:
        1 + gain * log(1 + position // tokens), float32[B, T], natural log; None for layers that stay as they are: those with
        RoPE, those that see a part of the text, and all if `temperature_tokens` is 0.
    """
    shapes.check(position_BT=position_BT)
    sees_all = model.pattern[letter] in GLOBAL_KINDS
    if not model.temperature_tokens or not sees_all or model.positions[letter] == "r":
        return None
    times_BT = (position_BT // model.temperature_tokens).astype(jnp.float32)
    return 1 + model.temperature_gain * jnp.log1p(times_BT)


def sharpen(q_BTHK, sharpness_BT):
    """Queries times their token's sharpness, multiplied in float32; as they are if that is None."""
    shapes.check(q_BTHK=q_BTHK, sharpness_BT=sharpness_BT)
    if sharpness_BT is None:
        return q_BTHK
    return (q_BTHK * sharpness_BT[..., None, None]).astype(q_BTHK.dtype)
