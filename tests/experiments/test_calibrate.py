"""Missed mass is what lists leave out, and a policy keeps no more layers than it must."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsa.pretrained import checkpoint
from experiments import calibrate, selector_loss, swapped
from tests.bsa.pretrained import checkpoints

T = 64
INDEX = {"C": 4, "query_block": 8, "J": 20, "sink_tokens": 4, "R": 2, "open_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write(checkpoints.config("llama3"), folder)
    return swapped.Model(checkpoint.open_checkpoint(str(folder)))


def test_missed_mass_falls_with_the_budget(model):
    token_T = np.random.default_rng(0).integers(0, 32, T + 1)
    found = []
    for choices in (1, 4, 16):
        knobs = tuple((INDEX | {"A": choices}).items())
        swap = swapped.Swap("b", window_tokens=8, index=knobs)
        found.append(calibrate.measure_missed(model, token_T, swap))
    missed, overlap = zip(*found)
    assert missed[0].shape == (2, 2)
    assert (missed[0] > missed[1]).all() and (missed[1] > 0.001).all()
    np.testing.assert_allclose(missed[2], 0, atol=1e-5)
    assert 0 < overlap[0][1] < overlap[1][1] < overlap[2][1] == 1, (
        "all that is open is chosen by both layers"
    )


def test_layers_of_several_kinds_are_measured_together(model):
    token_T = np.random.default_rng(0).integers(0, 32, T + 1)
    knobs = tuple((INDEX | {"A": 1}).items())
    found = model.measure(token_T, swapped.Swap("db", window_tokens=8, index=knobs))
    alone = model.measure(token_T, swapped.Swap("b", window_tokens=8, index=knobs))
    dense = np.mean(np.arange(T // 2, T) + 1)
    assert alone["attended_tokens"] < found["attended_tokens"] < dense


def test_layers_that_choose_as_many_are_the_model(model):
    """And where the worse one chooses more, the mean stays."""
    token_T = np.random.default_rng(0).integers(0, 32, T + 1)
    swap = swapped.Swap("b", window_tokens=8, index=tuple((INDEX | {"A": 2}).items()))
    whole = model.measure(token_T, swap)
    found = model.measure_layers(token_T, swap, (2, 2))
    assert found == pytest.approx(whole, rel=1e-5)
    assert model.measure_layers(token_T, swap, (1, 3))["nats"] != found["nats"]
    missed_L = np.array([0.3, 0.1, 0.2, 0.5, 0.4, 0.05])
    assert selector_loss.share(missed_L, 4) == (4, 2, 4, 6, 6, 2)


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_fewest_that_are_enough(wanted, more):
    assert calibrate.fewest(lambda num: num >= wanted, wanted + more) == wanted
