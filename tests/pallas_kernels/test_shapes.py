"""`shapes.check` and `BlockSelection.check` refuse what doesn't fit, and say why."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSelection, shapes

Q_BTHK, K_BSGK = np.zeros((2, 40, 4, 8)), np.zeros((2, 64, 2, 8))


def _selection(**changes):
    """Lists for 40 queries in blocks of 16, three blocks each."""
    selection = BlockSelection(
        jnp.zeros((2, 2, 3, 3), jnp.int32),
        jnp.zeros((2, 2, 3), jnp.int32),
        jnp.zeros((2, 2, 3, 3), jnp.uint32),
        16,
        16,
    )
    return dataclasses.replace(selection, **changes)


def test_check_returns_every_size():
    sizes = shapes.check(q_BTHK=Q_BTHK, k_BSGK=K_BSGK, bias_BGTJ=None)
    assert sizes == {"B": 2, "T": 40, "H": 4, "K": 8, "S": 64, "G": 2}


def test_check_takes_1_for_a_broadcast_axis():
    assert shapes.check(x_B1=np.zeros((2, 1))) == {"B": 2}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_BT": np.zeros(3)}, r"x_BT has shape \(3,\), but its name promises 2 axes"),
        (
            {"x_BT": np.zeros((2, 3)), "y_B": np.zeros(4)},
            "y_B has B=4, but B=2 in x_BT",
        ),
        ({"x_TT": np.zeros((2, 3))}, "x_TT has T=3, but T=2"),
        ({"x_B1": np.zeros((2, 3))}, "x_B1 has 1=3, but 1=1"),
        ({"x_BZ": np.zeros((2, 3))}, "x_BZ: no axis is called Z"),
    ],
)
def test_check_refuses(arrays, message):
    with pytest.raises(ValueError, match=message):
        shapes.check(**arrays)


def test_selection_that_fits_is_accepted():
    _selection().check(Q_BTHK, K_BSGK)
    _selection(token_mask_BGQJ=None).check(Q_BTHK, K_BSGK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_block": 8}, "Q=3 lists for T=40 tokens in blocks of 8: 5 are needed"),
        ({"key_block": 0}, "must be at least 1 token"),
        ({"count_BGQ": jnp.zeros((2, 2, 3))}, "count float32; both must be int32"),
        ({"count_BGQ": jnp.zeros((2, 2, 4), jnp.int32)}, "count_BGQ has Q=4, but Q=3"),
        ({"token_mask_BGQJ": jnp.zeros((2, 2, 3, 3), jnp.int32)}, "must be uint32"),
    ],
)
def test_selection_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        _selection(**changes).check(Q_BTHK, K_BSGK)


def test_selection_refuses_uneven_heads():
    with pytest.raises(ValueError, match="H=3 is no multiple of G=2"):
        _selection().check(Q_BTHK[:, :, :3], K_BSGK)


def test_selection_refuses_a_mask_of_more_tokens_than_bits():
    arrays = [jnp.zeros((2, 2, 1, *tail), jnp.int32) for tail in ((3,), ())]
    masked = BlockSelection(*arrays, jnp.zeros((2, 2, 1, 3), jnp.uint32), 64, 16)
    with pytest.raises(ValueError, match="query_block=64 with a token mask; 32 tokens"):
        masked.check(Q_BTHK, K_BSGK)
    dataclasses.replace(masked, token_mask_BGQJ=None).check(Q_BTHK, K_BSGK)
