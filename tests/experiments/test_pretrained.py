"""Swapping a model's attention: what reads everything changes nothing, and budgets are kept."""

import numpy as np
import pytest

from bsa.pretrained import checkpoint
from experiments import pretrained, swapped
from tests.bsa.pretrained import checkpoints

T = 64
SMALL = {"C": 4, "query_block": 8, "J": 20, "sink_tokens": 4, "R": 2, "open_tokens": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write(checkpoints.config("llama3"), folder)
    return swapped.Model(checkpoint.open_checkpoint(str(folder)))


def swap(kind, window_tokens=8, per_head=False, **index):
    knobs = tuple((SMALL | index).items())
    return swapped.Swap(kind, window_tokens, per_head, knobs)


def test_what_reads_everything_is_dense(model):
    token_T = np.random.default_rng(0).integers(0, 32, T + 1)
    dense = model.measure(token_T, swap("d"))
    assert dense["attended_tokens"] == np.mean(np.arange(T // 2, T) + 1)
    everything = [swap("w", window_tokens=T), swap("b", A=16)]
    for same in (*everything, swap("b", per_head=True, A=16)):
        found = model.measure(token_T, same)
        assert np.isclose(found["nats"], dense["nats"], atol=1e-5)
    window = model.measure(token_T, swap("w"))
    assert window["attended_tokens"] == swap("w").local_tokens()
    few = [model.measure(token_T, swap("b", A=2, per_head=each)) for each in (0, 1)]
    for found in few:
        assert found["refused_choices"] == 0
        assert found["attended_tokens"] == swap("b").local_tokens() + 2 * 4
        assert abs(found["nats"] - dense["nats"]) > 1e-4
    assert few[0]["nats"] != few[1]["nats"]


@pytest.mark.parametrize("method", pretrained.METHODS)
def test_budgets_are_kept_and_used(method):
    for budget in pretrained.BUDGETS:
        chosen = pretrained.swap_of(method, budget)
        assert chosen.kind == {"dense": "d", "window": "w"}.get(method, "b")
        if method == "dense":
            continue
        index = dict(chosen.index)
        read = chosen.local_tokens()
        if chosen.kind == "b":
            A = index["A"]
            read += pretrained.open_cost(A) if method == "bookmark" else A * index["C"]
        assert budget - 64 < read <= budget


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match="no method is called 'h2o'"):
        pretrained.swap_of("h2o", 832)
