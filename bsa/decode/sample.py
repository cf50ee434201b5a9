"""Logits to the next token. Called by `generate`."""

import functools

import jax
import jax.numpy as jnp

from bsa.decode import settings
from pallas_kernels import shapes


def sample(logits_BV, key, sampling: settings.SamplingSettings):
    """Draws one token for each row: int32[B].

    Args:
        logits_BV: float32.
        key: of these draws; a row's own depends on it and on the row's number alone.
    """
    shapes.check(logits_BV=logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = keep_likeliest(logits_BV / sampling.temperature, sampling)
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(
        jnp.arange(logits_BV.shape[0])
    )
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_likeliest(logits_BV, sampling: settings.SamplingSettings):
    """Logits with -inf for the tokens that top_k and then top_p leave out; ties with the last one kept stay."""
    ranked_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if sampling.top_k:
        last_B1 = ranked_BV[:, min(sampling.top_k, ranked_BV.shape[1]) - 1, None]
        logits_BV = jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)
        ranked_BV = jnp.where(ranked_BV >= last_B1, ranked_BV, -jnp.inf)
    if sampling.top_p < 1:
        share_BV = jax.nn.softmax(ranked_BV, axis=-1)
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        kept_BV = jnp.where(before_BV < sampling.top_p, ranked_BV, jnp.inf)
        logits_BV = jnp.where(
            logits_BV >= kept_BV.min(-1, keepdims=True), logits_BV, -jnp.inf
        )
    return logits_BV
