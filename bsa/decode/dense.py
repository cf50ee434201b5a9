"""Dense attention of new tokens to a cached text. Called by `attend`."""

import jax.numpy as jnp
from jax import lax

from bsa.decode import blocks
from bsa.decode import cache as caches

LOGITS = 2**24
"""Logits of a dense layer that exist at the same time; longer texts are read in pieces of keys."""


def read(q_BTHK, memory: caches.LayerCache, position_BT, scale: float):
    """Attention of the new tokens to all keys up to their own, a piece of the keys at a time."""
    B, T, H, K = q_BTHK.shape
    G, N, C = memory.k.value_BGNCK.shape[1:4]
    q_BGTHK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 1, 3, 4)
    piece = min(N, max(1, LOGITS // (B * H * T * C)))
    last = position_BT.max() // C

    def add(number, state):
        high_BGTH, total_BGTH, sum_BGTHK = state
        first = jnp.minimum(number * piece, N - piece)
        k_BGSK, v_BGSK = (
            blocks.read_slots(x, first, piece).reshape(B, G, piece * C, K)
            for x in (memory.k, memory.v)
        )
        id_S = first * C + jnp.arange(piece * C, dtype=jnp.int32)
        s_BGTHS = scale * jnp.einsum(
            "BGTHK,BGSK->BGTHS", q_BGTHK, k_BGSK, preferred_element_type=jnp.float32
        )
        is_new_S = id_S >= number * piece * C
        reads_BTS = is_new_S & (id_S <= position_BT[..., None])
        s_BGTHS = jnp.where(reads_BTS[:, None, :, None], s_BGTHS, -jnp.inf)
        new_high = jnp.maximum(high_BGTH, s_BGTHS.max(-1))
        p_BGTHS = jnp.exp(s_BGTHS - new_high[..., None])
        fade = jnp.exp(high_BGTH - new_high)
        more_BGTHK = jnp.einsum(
            "BGTHS,BGSK->BGTHK",
            p_BGTHS.astype(v_BGSK.dtype),
            v_BGSK,
            preferred_element_type=jnp.float32,
        )
        return (
            new_high,
            total_BGTH * fade + p_BGTHS.sum(-1),
            sum_BGTHK * fade[..., None] + more_BGTHK,
        )

    # Every token reads the first key, so that no maximum stays at -inf.
    shape = q_BGTHK.shape[:-1]
    state = (
        jnp.full(shape, -jnp.inf),
        jnp.zeros(shape),
        jnp.zeros(q_BGTHK.shape, jnp.float32),
    )
    _, total, out = lax.fori_loop(0, last // piece + 1, add, state)
    out_BTGHK = (out / total[..., None]).transpose(0, 2, 1, 3, 4)
    return out_BTGHK.reshape(B, T, H, K).astype(q_BTHK.dtype)
