"""What the operator of NSA gets, and the lists that ours gets, say the same."""

import functools

import jax
import numpy as np
import pytest

from experiments import bench_nsa

T = 1536


@functools.cache
def _draw():
    return jax.jit(bench_nsa.draw, static_argnums=(0, 1))(T, 36)


@pytest.mark.parametrize("query_block", bench_nsa.QUERY_BLOCKS)
def test_lists_say_what_tokens_chose(query_block):
    choice_BTGA, lists = _draw()
    chosen, lists = np.asarray(choice_BTGA)[0], lists[query_block]
    assert lists.query_block == query_block
    reads = np.zeros((T, bench_nsa.G, T // bench_nsa.KEY_BLOCK + 1), np.uint32)
    lists = jax.tree.map(lambda x: np.asarray(x)[0], lists)
    for group, i, j in np.ndindex(lists.block_id_BGQJ.shape):
        block_id = lists.block_id_BGQJ[group, i, j]
        assert (block_id >= 0) == (j < lists.count_BGQ[group, i])
        for token in range(lists.query_block):
            bit = lists.token_mask_BGQJ[group, i, j] >> token & 1
            reads[i * lists.query_block + token, group, block_id] += bit
    wanted = np.zeros_like(reads)
    for place in np.ndindex(chosen.shape):
        wanted[place[0], place[1], chosen[place]] += 1
    np.testing.assert_array_equal(reads[..., :-1], wanted[..., :-1])
    assert wanted[..., :-1].max() == 1, "a token chose a block twice"
    own = np.arange(T) // bench_nsa.KEY_BLOCK
    assert wanted[np.arange(T), 0, own].all() and wanted[:, :, 0].all()
    assert (wanted[-1, :, :-1].sum(-1) == bench_nsa.CHOSEN).all()

    keys = np.arange(T)
    sees = wanted[..., keys // bench_nsa.KEY_BLOCK] & (keys <= keys[:, None])[:, None]
    pairs = sees.sum() * (bench_nsa.H // bench_nsa.G)
    assert bench_nsa.count_pairs(choice_BTGA) == pairs
