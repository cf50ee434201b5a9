"""What is recorded beside accuracy: where keys lie, what an answer's first token reads, and how lists grow with choices."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest

from bsa.decode import attend
from bsa.decode import cache as caches
from bsa.decode import settings as decode_settings
from bsa.model import decoder
from bsa.train import settings
from configs import tiny
from experiments import passkey_long


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


def test_lists_have_room_for_more_choices(run):
    index = run.model.index

    def read_by(**asked):
        arguments = argparse.Namespace(
            **{"route": "chapters", "choices": 0, "beam": 0, **asked}
        )
        return passkey_long.reading_index(index, 4096, arguments)

    assert (read_by().A, read_by().beam) == (index.A, index.beam)
    assert read_by().J >= index.J
    wide = read_by(choices=16, beam=32)
    assert (wide.A, wide.J, wide.beam) == (16, 256, 32)


def test_a_key_is_read_where_everything_is(run):
    tokens, num = 512, 2
    prompts, answers, places = (
        np.stack(rows) for rows in zip(*passkey_long.documents(run, tokens, 0.5, num))
    )
    index = dataclasses.replace(run.model.index, A=tokens // 16, J=tokens // 16 + 4)
    model = dataclasses.replace(run.model, index=index)
    empty = caches.empty(model, decode_settings.CacheSettings(tokens + 16, 256), num)
    params = decoder.init(jax.random.key(0), model)
    right_BT, (blocks, finds_B), _ = passkey_long.measure(
        params, model, empty, prompts, answers, places
    )
    assert right_BT.shape == answers.shape
    assert finds_B.all() and blocks == -(-prompts.shape[1] // index.C)


def test_reads_are_counted_over_layers_and_heads_but_found_in_any():
    block_id_BGJ = np.array([[[0, 7, -1], [0, 3, 9]], [[0, 7, 8], [0, -1, -1]]])
    reading = attend.Reading(block_id_BGJ, None, None)
    blocks, finds_B = passkey_long.how_read(
        [None, reading, reading], np.array([[3, 4], [3, 4]])
    )
    assert blocks == 2.25 and finds_B.tolist() == [True, False]
    assert passkey_long.how_read([None], np.array([[3, 4]])) is None
