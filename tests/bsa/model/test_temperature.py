"""Attention that grows sharper beyond the length it was learned on: where, how much, and nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.model import decoder
from tests.bsa.model.cases import MODEL

T, TRAINED, GAIN = 64, 20, 0.4


@pytest.mark.parametrize(
    "pattern, positions, is_sharp",
    [("wd", "rn", True), ("wb", "rn", True), ("ww", "rn", False), ("wd", "rr", False)],
)
def test_global_layers_without_rope_grow_sharper(pattern, positions, is_sharp):
    """By Llama 4's rule; what lies before the trained length's end stays bit for bit."""
    plain = dataclasses.replace(
        MODEL, pattern=pattern, positions=positions, window_tokens=(16, 16)
    )
    sharp = dataclasses.replace(
        plain, temperature_tokens=TRAINED, temperature_gain=GAIN
    )
    params = decoder.init(jax.random.key(0), plain)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)
    token_BT = jax.random.randint(jax.random.key(1), (2, T), 0, plain.V)
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    texts = token_BT, jnp.ones_like(token_BT), position_BT

    name = f"1_{pattern[1]}"
    was, query = (
        # The first repetition's, before which nothing differs.
        decoder.queries_and_keys(params, *texts, model)[name][0][0]
        for model in (plain, sharp)
    )
    times_T = 1 + GAIN * np.log1p(np.arange(T) // TRAINED) * is_sharp
    np.testing.assert_allclose(query, was * times_T[:, None, None], rtol=1e-5)

    before, after = (
        np.asarray(decoder.apply(params, *texts, model)[0]) for model in (plain, sharp)
    )
    np.testing.assert_array_equal(after[:, :TRAINED], before[:, :TRAINED])
    assert np.any(after[:, TRAINED:] != before[:, TRAINED:]) == is_sharp
