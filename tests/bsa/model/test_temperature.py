"""Attention that grows sharper beyond the length it was learned on: where, how much, and nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.model import attention, decoder, temperature
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


def test_who_asks_again_stays_as_sharp():
    """What was found joins a query as it would without temperature: only the length differs."""
    keys = jax.random.split(jax.random.key(2), 3)
    q_BTHK, found_BTHK = (jax.random.normal(key, (2, T, 4, 8)) for key in keys[:2])
    again_HKK = jax.random.normal(keys[2], (4, 8, 8))
    model = dataclasses.replace(
        MODEL, pattern="b", positions="n", window_tokens=(16,), temperature_tokens=9
    )
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    sharpness_BT = temperature.sharpness(position_BT, model, 0)

    def ask(q_BTHK, sharpness_BT):
        heads = attention.Heads(
            *(q_BTHK, q_BTHK, q_BTHK, (q_BTHK, q_BTHK)),
            again_HKK=again_HKK,
            sharpness_BT=sharpness_BT,
        )
        return heads.ask_again(found_BTHK).q_BTHK

    sharp_BTHK = ask(temperature.sharpen(q_BTHK, sharpness_BT), sharpness_BT)
    expected = temperature.sharpen(ask(q_BTHK, None), sharpness_BT)
    np.testing.assert_allclose(sharp_BTHK, expected, rtol=1e-5, atol=1e-5)
    assert (sharpness_BT[:, 9:] > 1).all()
