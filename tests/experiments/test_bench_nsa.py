"""What the operator of NSA gets, and the lists that ours gets, say the same."""

import jax
import numpy as np

from experiments import bench_nsa

T = 1536


def test_lists_say_what_tokens_chose():
    choice_BTGA, lists = bench_nsa.draw(T, pool=36)
    chosen = np.asarray(choice_BTGA)[0]
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
