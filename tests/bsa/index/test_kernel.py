"""Tokens choose through the kernel what they choose through XLA, and compare as many nodes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from bsa.index import kernel
from pallas_kernels import mosaic_gpu, mosaic_gpu_search
from tests.bsa.index import cases

TOKENS = 2 * 264
G = 2


def test_kernel_chooses_what_xla_chooses(monkeypatch):
    """Three documents in a row; with chapters of chapters, some of them cut by documents and windows."""
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
        lloyd_steps=1,
    )
    q, k = cases.queries_and_keys(0, (1, TOKENS, 4, G, 64), index, kinds=0)
    view = cases.window_view(
        cases.positions(jax.random.key(1), 1, TOKENS, 2), 2 * index.C, index
    )
    bookmarks = cases.build_index(k, index)
    # As the kernel rounds them, for both.
    point_BGMRK, *chapters = (
        x.astype(jnp.bfloat16).astype(jnp.float32) for x, _ in bookmarks.nodes
    )
    bookmarks = dataclasses.replace(
        bookmarks,
        point_BGMRK=point_BGMRK,
        chapters=tuple(
            dataclasses.replace(level, point_BGERK=x)
            for level, x in zip(bookmarks.chapters, chapters)
        ),
    )
    q = jnp.round(q * 8) / 8  # Sums of two heads fit into bfloat16.
    assert kernel.can_search(q, bookmarks, index, "mosaic_gpu")
    q_BTGK = q.reshape(1, TOKENS, G, 2, 64).mean(3) * cases.SCALE
    choice, scored = kernel.search(q_BTGK, bookmarks, view.open_blocks, index)
    expected, expected_scored = cases.search(q, k, bookmarks, view, index=index)
    np.testing.assert_array_equal(scored, expected_scored)
    assert (choice == expected).mean() > 0.999, "more than rounding"
