"""Transposed lists hold each entry once, in order, and are linear in memory."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import transpose

# Few shapes, since each is compiled.
sizes = st.sampled_from([(1, 2, 9, 6), (2, 1, 4, 3)])
num_blocks = st.sampled_from([1, 12])
_transpose = jax.jit(transpose.transpose, static_argnums=2)
_cut = jax.jit(transpose.cut, static_argnums=1)


def _draw_lists(seed, B, G, Q, J, N, sink):
    """Lists in no order; with `sink`, block 0 is in every list that has an entry."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, min(J, N) + 1, (B, G, Q)).astype(np.int32)
    block_id = np.full((B, G, Q, J), -1, np.int32)
    for place in np.ndindex(B, G, Q):
        chosen = rng.permutation(N)[: count[place]]
        if sink and count[place] and 0 not in chosen:
            chosen[rng.integers(count[place])] = 0
        block_id[place][: count[place]] = chosen
    return block_id, count


def _expected_rows(block_id_QJ, count_Q, N):
    """Entries of each row, by walking over the lists."""
    J = block_id_QJ.shape[1]
    rows = [[] for _ in range(N)]
    for i, count in enumerate(count_Q):
        for j in range(count):
            rows[block_id_QJ[i, j]].append(i * J + j)
    return rows


@hypothesis.settings(max_examples=60)
@hypothesis.given(sizes, num_blocks, st.booleans(), st.integers(0, 2**20))
def test_rows_are_those_of_a_walk_over_the_lists(sizes, N, sink, seed):
    block_id, count = _draw_lists(seed, *sizes, N, sink)
    readers = _transpose(block_id, count, N)
    entry, first = np.asarray(readers.entry), np.asarray(readers.first)
    for place in np.ndindex(count.shape[:2]):
        rows = _expected_rows(block_id[place], count[place], N)
        for n, row in enumerate(rows):
            assert entry[place][first[place][n] : first[place][n + 1]].tolist() == row
        assert first[place][0] == 0
        assert (entry[place][first[place][-1] :] == -1).all()


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    sizes, num_blocks, st.sampled_from([1, 4]), st.booleans(), st.integers(0, 2**20)
)
def test_pieces_cover_each_row_once(sizes, N, length, sink, seed):
    block_id, count = _draw_lists(seed, *sizes, N, sink)
    readers = _transpose(block_id, count, N)
    pieces = jax.tree.map(np.asarray, _cut(readers, length))
    first = np.asarray(readers.first)
    for place in np.ndindex(count.shape[:2]):
        for n in range(N):
            mine = range(*pieces.first_piece[place][n : n + 2])
            covered = []
            for p in mine:
                assert pieces.block_id[place][p] == n
                some = range(pieces.first[place][p], pieces.last[place][p])
                assert 1 <= len(some) <= length
                covered += some
            assert covered == list(range(*first[place][n : n + 2]))
        used = pieces.first_piece[place][-1]
        assert (pieces.block_id[place][used:] == N).all()
        assert (pieces.first[place][used:] == pieces.last[place][used:]).all()


def test_memory_is_linear_in_the_entries():
    Q, J, N = 2**16, 64, 2**16

    def lists(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    compiled = (
        jax.jit(lambda *lists: transpose.transpose(*lists, N))
        .lower(lists(1, 1, Q, J), lists(1, 1, Q))
        .compile()
    )
    memory = compiled.memory_analysis()
    entries_bytes = 4 * Q * J
    assert memory.output_size_in_bytes < 1.1 * entries_bytes
    assert memory.temp_size_in_bytes < 8 * entries_bytes


def test_too_many_entries_are_refused():
    lists = [
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in ((1, 1, 2**25, 64), (1, 1, 2**25))
    ]
    with pytest.raises(ValueError, match="pass 2\\^31 entries"):
        jax.eval_shape(lambda *lists: transpose.transpose(*lists, 8), *lists)
