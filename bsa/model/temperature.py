"""Attention's temperature in texts longer than those it was learned on: queries grow with position. Called by `layers`."""

import jax.numpy as jnp

from bsa.model import settings


def sharpness(position_BT, model: settings.ModelSettings):
    """1 + gain * log(1 + position // tokens), float32: the more there is to read, the sharper attention; 1 at first.

    As Llama 4 has it, whose `floor_scale` is `temperature_tokens` and whose `attn_scale` is `temperature_gain`.
    """
    times_BT = (position_BT // model.temperature_tokens).astype(jnp.float32)
    return 1 + model.temperature_gain * jnp.log1p(times_BT)


def sharpen(q_BTHK, sharpness_BT):
    """Queries times their token's sharpness, in float32; as they are if that is None."""
    if sharpness_BT is None:
        return q_BTHK
    return (q_BTHK * sharpness_BT[..., None, None]).astype(q_BTHK.dtype)
