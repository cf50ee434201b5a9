"""Small settings that tests of the model and of decoding share."""

import dataclasses

from bsa.model.settings import ModelSettings
from tests.bsa.index import cases

INDEX = dataclasses.replace(cases.BASE, J=16, open_tokens=8, route_tokens=64)
MODEL = ModelSettings(
    D=16,
    H=4,
    G=2,
    K=8,
    F=24,
    V=32,
    L=4,
    pattern="wb",
    positions="rn",
    window_tokens=(16, 8),
    chunk_tokens=20,
    qk_norm=True,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    dtype="float32",
    remat="none",
    mlp_tokens=0,
    implementation="auto",
    index=INDEX,
)
