"""What is recorded beside accuracy: where keys lie, what an answer's first token reads, and how lists grow with choices."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.decode import attend
from bsa.decode import cache as caches
from bsa.decode import settings as decode_settings
from bsa.index import local, unite
from bsa.model import decoder
from bsa.train import settings
from configs import tiny
from experiments import decode, passkey_long

WAYS = ["chapters", "flat", "flat:32:64:0.3"]


@pytest.fixture(scope="module")
def run():
    config = tiny.get_config()
    config.model.update(D=16, H=2, G=1, K=8, F=16, L=2)
    return settings.from_config(config)


@pytest.mark.parametrize("depth", (0, 0.5, 1))
def test_both_mentions_of_a_key_are_found(run, depth):
    for prompt_T, answer_T, places in passkey_long.documents(run, 1000, depth, 2):
        for place in places:
            assert (prompt_T[place : place + len(answer_T)] == answer_T).all()
        assert len(set(places)) == 2


@pytest.mark.parametrize("choices", (0, 5))
def test_no_choice_is_refused(run, choices):
    arguments = argparse.Namespace(route="chapters", choices=choices, beam=32)
    model = passkey_long.reading_model(run.model, 4096, arguments)
    index = model.index
    assert (index.A, index.beam) == (choices or run.model.index.A, 32)
    T = 640
    view = local.window(
        jnp.arange(T, dtype=jnp.int32)[None],
        window_tokens=max(model.window_tokens),
        sink_tokens=index.sink_tokens,
        key_block=index.C,
    )
    # Blocks that no other token nearby chooses, nor reads without asking.
    apart = jnp.arange(T * index.A, dtype=jnp.int32) % (T // 2) + T
    lists, refused_BGQ = unite.unite(
        apart.reshape(1, 1, T, index.A), view, index, 1, num_blocks=2 * T
    )
    assert (refused_BGQ == 0).all() and lists.count_BGQ.max() == index.J


def test_a_key_is_read_where_everything_is(run):
    """However question and answer choose, which go on from one reading of the text."""
    tokens, num = 512, 2
    batch = list(passkey_long.documents(run, tokens, 0.5, num))
    index = dataclasses.replace(run.model.index, A=tokens // 16, J=tokens // 16 + 4)
    model = dataclasses.replace(run.model, index=index)
    model = dataclasses.replace(
        model, index=decode.long_index(index, tokens, "chapters")
    )
    empty = caches.empty(model, decode_settings.CacheSettings(tokens + 16, 256), num)
    params = decoder.init(jax.random.key(0), model)
    asked, rate = passkey_long.measure(params, model, empty, batch, WAYS)
    assert list(asked) == WAYS and rate > 0
    for right_BT, (blocks, finds_B), _ in asked.values():
        assert right_BT.shape == (num, len(batch[0][1]))
        assert finds_B.all() and blocks == -(-len(batch[0][0]) // index.C)


def test_a_way_of_asking_changes_what_it_names_alone(run):
    model = run.model
    asks = passkey_long.ask_by(model, "flat:32:64:0.3")
    assert (asks.index.route, asks.index.X) == ("flat", 32)
    assert (asks.temperature_tokens, asks.temperature_gain) == (64, 0.3)
    assert passkey_long.ask_by(model, "flat:32:64").temperature_gain == 0.1
    assert passkey_long.ask_by(model, model.index.route) == model


def test_reads_are_counted_over_layers_and_heads_but_found_in_any():
    block_id_BGJ = np.array([[[0, 7, -1], [0, 3, 9]], [[0, 7, 8], [0, -1, -1]]])
    reading = attend.Reading(block_id_BGJ, None, None)
    blocks, finds_B = passkey_long.how_read(
        [None, reading, reading], np.array([[3, 4], [3, 4]])
    )
    assert blocks == 2.25 and finds_B.tolist() == [True, False]
    assert passkey_long.how_read([None], np.array([[3, 4]])) is None
