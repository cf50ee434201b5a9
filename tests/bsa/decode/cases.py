"""Models that the tests of decoding share, and the parallel pass that they are held to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.model import decoder
from tests.bsa.model import cases

INDEX = dataclasses.replace(
    cases.INDEX, J=12, lloyd_steps=1, A=4, open_tokens=11, chapter_levels=2, frontier=6
)
MIXED = dataclasses.replace(
    cases.MODEL,
    L=6,
    pattern="dscwbf",
    positions="rrrrnr",
    window_tokens=(16, 10, 16, 16, 16, 16),
    chunk_tokens=50,
    index=INDEX,
    ask_again=True,
    temperature_tokens=60,
    temperature_gain=0.3,
)


ALIKE = dataclasses.replace(
    MIXED,
    pattern="wwb",
    positions="rrn",
    window_tokens=(16,) * 3,
    window_sinks=False,
)
"""Six layers of two kinds: those of a kind differ by their parameters alone."""


def bookmarks_only(positions, **index):
    """One bookmark layer whose index differs."""
    return dataclasses.replace(
        MIXED,
        ask_again=False,
        L=1,
        pattern="b",
        positions=positions,
        window_tokens=(16,),
        index=dataclasses.replace(INDEX, **index),
    )


CHAPTERS = bookmarks_only(
    "r",
    route="chapters",
    X=4,
    query_pool="heads",
    span_blocks=3,
    spans="learned",
    top_p=0.8,
    store="bfloat16",
    chapter_by="cluster",
    volume_chapters=2,
)
GRAPH = dataclasses.replace(
    bookmarks_only("n", route="graph", P=2, query_block=4, J=24, digest="spread"),
    G=4,
    score_weight=0.5,
    mass_weight=0.75,
    route_width=6,
    route_taps=3,
)
T = 1088
"""Tokens of a row."""


@functools.cache
def parameters(model):
    """Parameters large enough that attention and routing are far from uniform."""
    params = decoder.init(jax.random.key(0), model)
    return jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)


@functools.partial(jax.jit, static_argnames="model")
def logits(params, token_BT, *, model):
    """Of every position, all at once."""
    segment_BT = jnp.ones_like(token_BT)
    position_BT = jnp.cumsum(segment_BT, axis=1) - 1
    hidden_BTD, _ = decoder.apply(params, token_BT, segment_BT, position_BT, model)
    return hidden_BTD @ params["embedding_VD"].T


def tokens(seed, batch=2):
    return np.random.default_rng(seed).integers(0, MIXED.V, (batch, T), np.int32)
