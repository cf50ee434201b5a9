"""What window layers know of a text's beginning: by sinks its distance, without them nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.model import decoder
from tests.bsa.model.cases import INDEX, MODEL

WINDOW, TAIL = 16, 32


@pytest.mark.parametrize("window_sinks", [False, True])
def test_a_token_knows_its_place_by_sinks_alone(window_sinks):
    """The same words behind texts of different length: windows with RoPE see distances only, and sinks tell how far they are."""
    model = dataclasses.replace(
        MODEL,
        L=2,
        pattern="ww",
        positions="rr",
        window_tokens=(WINDOW, WINDOW),
        window_sinks=window_sinks,
        index=dataclasses.replace(INDEX, sink_tokens=INDEX.C),
    )
    params = decoder.init(jax.random.key(0), model)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)
    reach = model.L * WINDOW
    words = jax.random.randint(jax.random.key(1), (1, 512), 0, model.V)
    begin, rest = words[:, : INDEX.C], words[:, INDEX.C :]

    def tail(num):
        token_BT = jnp.concatenate([begin, rest[:, -num:]], 1)
        position_BT = jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None]
        segments = jnp.ones_like(position_BT)
        hidden, _ = decoder.apply(params, token_BT, segments, position_BT, model)
        return np.asarray(hidden[:, -TAIL:])

    gaps = [np.abs(tail(n) - tail(reach + TAIL + 4)).max() for n in (132, 260)]
    assert min(gaps) > 1e-2 if window_sinks else max(gaps) < 1e-4, gaps
