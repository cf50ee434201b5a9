"""A step that reads through the Hopper kernel gives the logits of one that reads through XLA."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from bsa.decode import cache as caches
from bsa.decode import step
from bsa.decode.settings import CacheSettings
from pallas_kernels import mosaic_gpu, mosaic_gpu_decode
from tests.bsa.decode import cases

# Interpreted warpgroups wait for each other on threads; see tests/pallas_kernels/conftest.py.
os.environ.setdefault("PJRT_NPROC", "32")

MODEL = dataclasses.replace(
    cases.bookmarks_only("r", C=16, J=6, sink_tokens=16, A=2),
    dtype="bfloat16",
    K=64,
    implementation="mosaic_gpu",
)
TOKENS = np.array([150, 92])


def test_kernel_reads_what_xla_reads(monkeypatch):
    """Rows of different lengths; the lists leave out most of the longer one."""
    called = []

    def attend(*arguments, **options):
        called.append(True)
        return real(*arguments, **options)

    real = mosaic_gpu_decode.attend
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        real = functools.partial(real, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_gpu_decode, "attend", attend)
    by_xla = dataclasses.replace(MODEL, implementation="xla")
    params = cases.parameters(by_xla)
    token_BT = cases.tokens(0)[:, : TOKENS.max()]
    cache = caches.empty(by_xla, CacheSettings(160, 160), 2)
    _, cache = step.prefill(params, token_BT, cache, by_xla, count_B=TOKENS)
    found = []
    for model in (MODEL, by_xla):
        mine = jax.tree.map(jnp.copy, cache)
        logits_BV, readings, _ = step.decode_step(
            params, jnp.asarray([3, 5]), mine, model
        )
        found.append((logits_BV, jax.tree.leaves(readings)))
        assert len(called) == 1, "once in the kernel's step, never in XLA's"
    (ours, read), (theirs, expected) = found
    for x, y in zip(read, expected):
        np.testing.assert_array_equal(x, y)
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(ours, theirs, atol=8 * unit * np.abs(theirs).max())
