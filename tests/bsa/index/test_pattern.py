"""Patterns: what they say, within what is open, and the same however the text goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.index import local, pattern
from bsa.index.settings import PATTERNS
from tests.bsa.index import cases

B, T, G, A, STRIDE = 2, 320, 2, 4, 5


@pytest.mark.parametrize("route", PATTERNS)
def test_patterns(route):
    index = dataclasses.replace(cases.BASE, route=route, stride=STRIDE, A=A)
    view = cases.window_view(cases.positions(jax.random.key(3), B, T, 2), 8, index)
    low_BT, high_BT = (np.asarray(x) for x in view.open_blocks)
    choice_BGTA = np.asarray(pattern.choose(view.open_blocks, G, index))
    assert choice_BGTA.shape == (B, G, T, A)
    for row, g, t in np.ndindex(B, G, T):
        low, high = low_BT[row, t], high_BT[row, t]
        found = [n for n in choice_BGTA[row, g, t] if n >= 0]
        assert len(set(found)) == len(found) and all(low <= n < high for n in found)
        if route == "strided":
            wanted = [high - STRIDE * k for k in range(1, A + 1)]
        elif route == "fixed":
            ends = [n for n in range(low, high) if (n - low) % STRIDE == STRIDE - 1]
            wanted = ends[::-1][:A]
        else:
            assert len(found) == min(max(high - low, 0), A)
            continue
        assert found == [n for n in wanted if n >= low]

    # A token alone, as decoding has it.
    place_BT = jnp.full((1, 1), 250)
    alone = local.window(
        place_BT, window_tokens=8, sink_tokens=4, key_block=4, place_BT=place_BT
    )
    whole = cases.window_view(jnp.arange(T)[None], 8, index)
    np.testing.assert_array_equal(
        pattern.choose(alone.open_blocks, G, index)[:, :, 0],
        pattern.choose(whole.open_blocks, G, index)[:, :, 250],
    )


def test_random_blocks_are_spread_evenly():
    index = dataclasses.replace(cases.BASE, route="random", A=A)
    high_BT = 800 + jnp.arange(4000)[None]
    choice = pattern.choose((high_BT - 800, high_BT), G, index)
    offset = np.asarray(choice - (high_BT - 800)[:, None, :, None])
    counts = np.bincount(offset.ravel(), minlength=800)
    assert counts.sum() == 4000 * G * A and (abs(counts - 40) < 5 * 40**0.5).all()
