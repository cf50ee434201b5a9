"""Rows of readers hold each query block that reads a key tile once, and say who reads what."""

import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np

from pallas_kernels import mosaic_gpu_readers

Q, J, TILES = 7, 5, 3


def _draw_lists(seed, blocks):
    rng = np.random.default_rng(seed)
    N = TILES * blocks
    count = rng.integers(0, min(J, N) + 1, (1, 2, Q)).astype(np.int32)
    block_id = np.full((1, 2, Q, J), -1, np.int32)
    for place in np.ndindex(count.shape):
        block_id[place][: count[place]] = rng.permutation(N)[: count[place]]
    mask = rng.integers(1, 2**16, block_id.shape).astype(np.int32)
    return block_id, count, mask


def _walk(block_id_QJ, count_Q, mask_QJ, blocks):
    """For each tile its columns: query block, words, slots."""
    rows = [[] for _ in range(TILES)]
    for i, count in enumerate(count_Q):
        for tile, row in enumerate(rows):
            words, slots = [0] * blocks, [0] * blocks
            for j in range(count):
                if block_id_QJ[i, j] // blocks == tile:
                    words[block_id_QJ[i, j] % blocks] = mask_QJ[i, j]
                    slots[block_id_QJ[i, j] % blocks] = j
            if any(words):
                row.append([i, *words, *slots])
    return rows


@functools.partial(jax.jit, static_argnums=(3, 4))
def _collect(block_id, count, mask, blocks, length):
    plan = types.SimpleNamespace(blocks=blocks, has_bias=True)
    return mosaic_gpu_readers.collect(plan, block_id, count, mask, TILES, length)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.sampled_from([1, 4]), st.sampled_from([2]), st.integers(0, 2**20))
def test_rows_are_those_of_a_walk_over_the_lists(blocks, length, seed):
    lists = _draw_lists(seed, blocks)
    readers = jax.tree.map(np.asarray, _collect(*lists, blocks, length))
    for b, g in np.ndindex(1, 2):
        rows = _walk(*(x[b, g] for x in lists), blocks)
        first_piece = readers.first_piece_BGN[b, g]
        for tile, row in enumerate(rows):
            columns = []
            for p in range(*first_piece[tile : tile + 2]):
                assert readers.tile_BGP[b, g, p] == tile
                some = slice(readers.first_BGP[b, g, p], readers.last_BGP[b, g, p])
                assert 0 < some.stop - some.start <= length
                columns += readers.table_BGFE[b, g, :, some].T.tolist()
            assert columns == row
        used = first_piece[-1]
        assert (readers.tile_BGP[b, g, used:] == TILES).all()
        # A copy of a whole piece stays inside the table.
        ends = readers.first_BGP[b, g] + length
        assert (ends <= readers.table_BGFE.shape[-1]).all()
