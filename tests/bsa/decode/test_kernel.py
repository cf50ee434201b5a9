"""Tokens that read through the Hopper kernels get what those that read through XLA get."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bsa.decode import attend
from bsa.decode import cache as caches
from bsa.decode.settings import CacheSettings
from bsa.index import kernel as search
from bsa.model import attention
from pallas_kernels import dispatch, mosaic_gpu, mosaic_gpu_decode
from tests.bsa.decode import cases

# Interpreted warpgroups wait for each other on threads; see tests/pallas_kernels/conftest.py.
os.environ.setdefault("PJRT_NPROC", "32")

MODEL = cases.bookmarks_only(
    "r", C=16, J=8, sink_tokens=16, R=1, A=2, query_block=16, route="flat"
)
MODEL = dataclasses.replace(MODEL, dtype="bfloat16", K=64)
PLACE_B1 = jnp.array([[120], [92]])
"""Of each row's first token: in the middle of a block."""


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _memory():
    """A text of random keys, of which the tokens before chose some blocks that are still open."""
    memory = caches.empty(MODEL, CacheSettings(160, 16), 2).layers[0]
    k, v = (
        dataclasses.replace(x, value_BGNCK=_normal(seed, *x.value_BGNCK.shape))
        for seed, x in enumerate((memory.k, memory.v))
    )
    recent = jax.random.randint(jax.random.key(2), memory.recent_BGTA.shape, 1, 5)
    return dataclasses.replace(memory, k=k, v=v, recent_BGTA=recent)


@pytest.mark.parametrize("T", (1, 20))
def test_kernel_reads_what_xla_reads(monkeypatch, T):
    """A token by the kernel of decoding, several by that of training: the keys lie where they were put, for both."""
    called, place_BT = [], PLACE_B1 + jnp.arange(T)
    real = mosaic_gpu_decode.attend if T == 1 else mosaic_gpu.attend
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        real = functools.partial(real, interpret=plgpu.InterpretGPUParams())

    def count_and_attend(*arguments, **options):
        called.append(True)
        return real(*arguments, **options)

    if T == 1:
        monkeypatch.setattr(mosaic_gpu_decode, "attend", count_and_attend)
    else:
        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", count_and_attend)
    # The kernel that searches rounds scores.
    monkeypatch.setattr(search, "can_search", lambda *_: False)
    memory, q = _memory(), _normal(3, 2, T, MODEL.H, MODEL.K)
    k, v = (_normal(seed, 2, T, MODEL.G, MODEL.K) for seed in (4, 5))
    found = []
    for implementation in ("mosaic_gpu", "xla"):
        model = dataclasses.replace(MODEL, implementation=implementation)

        @jax.jit
        def read(q, k, v, memory, model=model):
            room = CacheSettings(160, 32)
            context = attend.Context(memory, jnp.full(2, T), room, weigh=False)
            heads = attention.Heads(q, k, v, (q, k))
            return attend.attend(heads, None, place_BT, model, 0, context=context)

        out_BTHK, handed = read(q, k, v, memory)
        reading = handed["reading"]
        read_BGJ = reading.block_id_BGJ if T == 1 else None
        assert (reading is None) == (T > 1)
        found.append((out_BTHK, (handed[attention.FOLLOWED].lists, read_BGJ)))
        assert len(called) == 1, "once by the kernel, never by XLA"
    (ours, read), (theirs, expected) = found
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    read, _ = read
    num_blocks = 1 + place_BT[0, -1] // MODEL.index.C
    assert (read.count_BGQ[0, :, -1] < num_blocks).all(), "all was read"
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    ours, theirs = (x.astype(jnp.float32) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=4 * unit * np.abs(theirs).max())
