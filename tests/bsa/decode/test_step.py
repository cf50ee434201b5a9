"""Reading in pieces and then token by token is the parallel pass, for every kind of layer and every route."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bsa.decode import cache as caches
from bsa.decode import step
from bsa.decode.settings import CacheSettings
from tests.bsa.decode import cases

ROOM = CacheSettings(cases.T, 64)
GREEDY = 12
MODELS = {
    "dscwbf": cases.MIXED,
    "wwbwwb": cases.ALIKE,
    "chapters": cases.CHAPTERS,
    "graph": cases.GRAPH,
}


def assert_logits(found_V, expected_V):
    """Float32 rounding, of sums that go through all layers."""
    np.testing.assert_allclose(found_V, expected_V, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2)
@given(
    seed=st.integers(0, 999),
    chunks=st.lists(st.sampled_from([1, 7, 64, 1000]), min_size=1, max_size=20),
    late=st.floats(0, 1),
    piece=st.sampled_from([None, 40]),
)
@example(seed=0, chunks=[1] * 150, late=1.0, piece=None)
@example(seed=1, chunks=[1000], late=0.03, piece=None)
@example(seed=2, chunks=[7, 1000] + [7] * 50, late=0.5, piece=40)
def test_decoding_is_the_parallel_pass(name, seed, chunks, late, piece):
    """Rows of different lengths: the second takes only a share of every chunk. Pieces may be shorter than the cache's.

    Every chunk's logits are those of the whole text. What is then decoded greedily is what the whole text, the answer
    included, would have made likeliest at each position.
    """
    model = MODELS[name]
    params, token_BT = cases.parameters(model), cases.tokens(seed)
    cache = caches.empty(model, ROOM, 2)
    length_B, found = np.zeros(2, int), []
    for chunk in chunks:
        count_B = np.array([chunk, max(1, round(late * chunk))])
        if (length_B + count_B).max() > cases.T - GREEDY:
            continue
        part_BT = np.zeros((2, chunk), np.int32)
        for row in range(2):
            part = token_BT[row, length_B[row] : length_B[row] + count_B[row]]
            part_BT[row, : count_B[row]] = part
        last_BV, cache = step.prefill(
            params, part_BT, cache, model, count_B=count_B, piece_tokens=piece
        )
        length_B += count_B
        found.append((length_B - 1, last_BV))
    if not found:
        return
    np.testing.assert_array_equal(cache.length_B, length_B)

    answer = []
    for _ in range(GREEDY):
        answer.append(np.asarray(last_BV.argmax(-1)))
        last_BV, _, cache = step.decode_step(
            params, jnp.asarray(answer[-1], jnp.int32), cache, model
        )
    for row in range(2):
        place = length_B[row] + np.arange(GREEDY)
        token_BT[row, place] = [tokens[row] for tokens in answer]
    found.append((length_B + GREEDY - 1, last_BV))
    expected_BTV = np.asarray(cases.logits(params, token_BT, model=model))
    for row in range(2):
        for place_B, found_BV in found:
            assert_logits(found_BV[row], expected_BTV[row, place_B[row]])
        place = length_B[row] + np.arange(GREEDY)
        likeliest = expected_BTV[row, place - 1].argmax(-1)
        np.testing.assert_array_equal(likeliest, token_BT[row, place])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_compiled(caplog, name):
    """For pieces one layer of each kind, for single tokens all of them once, whatever the chunks were."""
    model = MODELS[name]
    jax.clear_caches()
    params, token_BT = cases.parameters(model), cases.tokens(0)
    cache = caches.empty(model, ROOM, 2)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for chunk in (1, 7, 64, 100, 1, 30):
            _, cache = step.prefill(params, token_BT[:, :chunk], cache, model)
    compiled = [text for text in caplog.messages if text.startswith("Compiling")]
    letters = zip(model.pattern, model.positions, model.window_tokens)
    assert sum("advance" in text for text in compiled) == 1, compiled
    assert sum("apply_layer" in text for text in compiled) == len(set(letters))


def test_no_chapters_are_copied_for_a_token():
    """The level above reads them in the step that writes them. Only the coarsest, all of which are scored, may cost memory."""
    model = cases.bookmarks_only("n", route="chapters", chapter_bookmarks=8)
    params, one = cases.parameters(model), jnp.ones(1, jnp.int32)
    step_of = jax.jit(step.advance, static_argnums=4, donate_argnums=3)
    needed = []
    for capacity in (2**13, 2**16):
        room = CacheSettings(capacity, 64)
        cache = jax.eval_shape(functools.partial(caches.empty, model, room, 1))
        compiled = step_of.lower(params, one[None], one, cache, model).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    finest = cache.layers[0].index.bookmarks.chapters[0].point_BGERK
    assert needed[1] - needed[0] < finest.size * finest.dtype.itemsize / 4


def test_an_answer_may_look_through_all_bookmarks_of_what_was_read_through_chapters():
    """It finds what it would have found in a text that was read so, once what the text's last tokens chose is closed.

    Below the only bookmark layer nothing differs.
    """
    reading = cases.bookmarks_only(
        "n", route="chapters", beam=1, chapter_bookmarks=2, chapter_levels=3
    )
    params, token_BT = cases.parameters(reading), cases.tokens(0)

    def read(model):
        _, cache = step.prefill(
            params, token_BT[:, :1000], caches.empty(model, ROOM, 2), model
        )
        return cache

    def ask(cache, model):
        answer = []
        for token_B in token_BT[:, 1000:1050].T:
            logits_BV, _, cache = step.decode_step(params, token_B, cache, model)
            answer.append(logits_BV)
        return np.stack(answer)[cases.INDEX.query_block + cases.INDEX.open_tokens :]

    flat = reading.answer_by("flat")
    expected = ask(read(flat), flat)
    np.testing.assert_array_equal(ask(read(reading), flat), expected)
    assert np.abs(ask(read(reading), reading) - expected).max() > 1e-3
    exact = reading.answer_by("flat", X=1000 // cases.INDEX.C)
    expected = ask(read(flat), exact)
    np.testing.assert_array_equal(ask(read(reading), exact), expected)
    assert np.abs(ask(read(flat), flat) - expected).max() > 1e-3
    with pytest.raises(ValueError, match="answer_route='graph'; flat or empty"):
        reading.answer_by("graph")
