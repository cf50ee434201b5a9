"""Tokens choose through the kernel what they choose through XLA, and compare as many nodes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bsa.index import kernel, route
from pallas_kernels import mosaic_gpu, mosaic_gpu_search
from tests.bsa.index import cases

TOKENS = 2 * 264
ASKED = 120
"""The last tokens."""
G = 2


@pytest.mark.parametrize(
    "digest, chapter_store, X",
    [("spread", "float32", 0), ("clusters", "float8", 0), ("clusters", "float32", 6)],
)
def test_kernel_chooses_what_xla_chooses(monkeypatch, digest, chapter_store, X):
    """Three documents in a row; with chapters of chapters, some of them cut by documents and windows; with a shortlist."""
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        find = functools.partial(
            mosaic_gpu_search.find, interpret=plgpu.InterpretGPUParams()
        )
        monkeypatch.setattr(mosaic_gpu_search, "find", find)
    index = dataclasses.replace(
        cases.BASE,
        C=2,
        route="chapters",
        chapter_bookmarks=16,
        chapter_levels=2,
        route_tokens=TOKENS,
        A=3,
        X=X,
        lloyd_steps=1,
        digest=digest,
        chapter_store=chapter_store,
        point_pool="max",
    )
    q, k = cases.queries_and_keys(0, (1, TOKENS, 4, G, 64), index, kinds=0)
    view = cases.window_view(
        cases.positions(jax.random.key(1), 1, TOKENS, 2), 2 * index.C, index
    )
    bookmarks = cases.build_index(k, index)
    k_BGMCK = k.reshape(1, -1, index.C, G, 64).transpose(0, 3, 1, 2, 4)
    # As the kernel rounds them, for both.
    point_BGMRK, *chapters = (
        x.astype(jnp.bfloat16).astype(jnp.float32) for x, *_ in bookmarks.nodes
    )
    bookmarks = dataclasses.replace(
        bookmarks,
        point_BGMRK=point_BGMRK,
        chapters=tuple(
            dataclasses.replace(level, point_BGERK=x)
            for level, x in zip(bookmarks.chapters, chapters)
        ),
    )
    q = jnp.round(q[:, -ASKED:] * 8) / 8  # Sums of two heads fit into bfloat16.
    open_blocks = [x[:, -ASKED:] for x in view.open_blocks]
    assert kernel.can_search(q, bookmarks, index, "mosaic_gpu")
    found, expected = (
        jax.jit(
            lambda q, bookmarks, open_blocks, name=name: route.search_blocks(
                q,
                k_BGMCK,
                bookmarks,
                open_blocks,
                index,
                scale=cases.SCALE,
                implementation=name,
            )
        )(q, bookmarks, open_blocks)
        for name in ("mosaic_gpu", "xla")
    )
    np.testing.assert_array_equal(found[1], expected[1])
    assert (found[0] == expected[0]).mean() > 0.99, "more than rounding"
