"""Models that the tests of decoding share, and the parallel pass that they are held to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index.settings import IndexSettings
from bsa.model import decoder
from bsa.model.settings import ModelSettings

INDEX = IndexSettings(
    C=4,
    query_block=8,
    J=12,
    sink_tokens=4,
    R=2,
    lloyd_steps=1,
    A=4,
    open_tokens=11,
    X=0,
    query_pool="mean",
    route_tokens=64,
    digest="clusters",
    route="flat",
    chapter_bookmarks=3,
    chapter_levels=2,
    chapter_R=2,
    beam=2,
    P=0,
    children=3,
    similarity="cosine",
    link_by="means",
    frontier=6,
    hops=1,
)
MIXED = ModelSettings(
    D=16,
    H=4,
    G=2,
    K=8,
    F=24,
    V=32,
    L=5,
    pattern="dscwb",
    positions="rrrrn",
    window_tokens=(16, 10, 16, 16, 16),
    chunk_tokens=50,
    qk_norm=True,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    dtype="float32",
    remat="none",
    mlp_tokens=0,
    implementation="auto",
    index=INDEX,
)


def bookmarks_only(positions, **index):
    """One bookmark layer whose index differs."""
    return dataclasses.replace(
        MIXED,
        L=1,
        pattern="b",
        positions=positions,
        window_tokens=(16,),
        index=dataclasses.replace(INDEX, **index),
    )


CHAPTERS = bookmarks_only("r", route="chapters", X=4, query_pool="heads")
GRAPH = bookmarks_only("n", route="graph", P=2, query_block=4, J=24)
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
