"""Ways to stretch positions. Parity with transformers is tested in tests/bsa/pretrained, where each has a model."""

import dataclasses

import numpy as np
import pytest

from bsa.model import rope


def stretched(kind, **changes):
    return dataclasses.replace(rope.UNSCALED, kind=kind, **changes)


def table(scaling, width=16, theta=1000.0):
    return rope.frequencies(width, theta, scaling)


def test_ntk_slows_the_slowest_pair_alone_by_the_whole_factor():
    ratio = table(rope.UNSCALED) / table(stretched("ntk", factor=4.0))
    np.testing.assert_allclose([ratio[0], ratio[-1]], [1, 4], rtol=1e-6)
    assert (np.diff(ratio) > 0).all()


def test_dynamic_is_ntk_for_texts_as_long_as_it_was_told():
    told = {"factor": 1.0, "trained_tokens": 100}
    np.testing.assert_array_equal(
        table(stretched("dynamic", tokens=100, **told)), table(rope.UNSCALED)
    )
    np.testing.assert_allclose(
        table(stretched("dynamic", tokens=300, **told)),
        table(stretched("ntk", factor=3.0)),
        rtol=1e-6,
    )


def test_heads_of_one_pair_turn():
    assert table(stretched("ntk", factor=2.0), width=2) == [1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "alibi"}, "kind='alibi' is not one of none, linear"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"kind": "yarn", "factor": 2.0}, "goes by trained_tokens=0"),
        ({"kind": "longrope", "trained_tokens": 9}, "needs short_factors"),
        ({"kind": "none", "slow_turns": 40.0}, "slow_turns=40.0 must lie between"),
    ],
)
def test_impossible_scalings_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        stretched(**change)


def test_factors_must_fit_the_head():
    factors = {"short_factors": (1.0,) * 7, "long_factors": (1.0,) * 7}
    with pytest.raises(ValueError, match="7 factors for the 8 pairs of heads of K=16"):
        table(stretched("longrope", trained_tokens=9, **factors))
