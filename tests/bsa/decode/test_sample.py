"""Drawing tokens: what may be drawn, how often, and that a seed decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa.decode import sample
from bsa.decode.settings import CacheSettings, SamplingSettings


@settings(max_examples=20)
@given(
    seed=st.integers(0, 999),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.05, 1),
)
def test_what_is_kept(seed, top_k, top_p):
    """The k likeliest, and of them the fewest that hold p of their probability."""
    logit_V = np.random.default_rng(seed).normal(size=8).astype(np.float32)
    sampling = SamplingSettings(temperature=1.0, top_k=top_k, top_p=top_p)
    kept = set(
        np.flatnonzero(
            sample.keep_likeliest(jnp.asarray(logit_V)[None], sampling)[0] > -np.inf
        )
    )
    order = np.argsort(-logit_V)[: top_k or None]
    share = np.exp(logit_V[order]) / np.exp(logit_V[order]).sum()
    fewest = 1 + int((np.cumsum(share)[:-1] < top_p - 1e-6).sum())
    assert kept == set(order[:fewest])


def test_draws_follow_the_probabilities_and_the_seed():
    logits_BV = jnp.tile(jnp.log(jnp.array([0.6, 0.3, 0.1])), (2000, 1))
    sampling, key = SamplingSettings(temperature=1.0), jax.random.key(3)
    drawn_B = np.asarray(sample.sample(logits_BV, key, sampling))
    share = np.bincount(drawn_B, minlength=3) / 2000
    np.testing.assert_allclose(share, [0.6, 0.3, 0.1], atol=0.05)
    np.testing.assert_array_equal(sample.sample(logits_BV, key, sampling), drawn_B)
    other = sample.sample(logits_BV, jax.random.key(4), sampling)
    assert (np.asarray(other) != drawn_B).any()
    # A row's draw does not depend on the rows beside it.
    few = sample.sample(logits_BV[:5], key, sampling)
    np.testing.assert_array_equal(few, drawn_B[:5])


def test_no_temperature_takes_the_likeliest():
    logits_BV = jax.random.normal(jax.random.key(0), (4, 9))
    key = jax.random.key(1)
    drawn_B = sample.sample(logits_BV, key, SamplingSettings())
    np.testing.assert_array_equal(drawn_B, logits_BV.argmax(-1))
    cold = SamplingSettings(temperature=1e-4)
    np.testing.assert_array_equal(sample.sample(logits_BV, key, cold), drawn_B)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"tokens_a_call": -1}, "tokens_a_call=-1"),
        ({"stop": ((),)}, "empty stop sequence"),
    ],
)
def test_impossible_sampling_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**change)
    with pytest.raises(ValueError, match="store='int4'"):
        CacheSettings(8, store="int4")
