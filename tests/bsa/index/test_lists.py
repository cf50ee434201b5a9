"""Lists of query blocks equal the NumPy loops, on random sizes, documents and choices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa.index import local, metrics, reference, unite
from tests.bsa.index import cases


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    key_block=st.sampled_from([2, 4, 8]),
    query_block=st.sampled_from([4, 8, 12, 32]),
    open_tokens=st.sampled_from([1, 3, 16, 32]),
    window_blocks=st.integers(1, 3),
    sink_blocks=st.integers(0, 2),
    choices=st.integers(1, 4),
    room=st.sampled_from([0, 2, 9, 200]),
    documents=st.integers(0, 3),
)
def test_lists(
    seed,
    key_block,
    query_block,
    open_tokens,
    window_blocks,
    sink_blocks,
    choices,
    room,
    documents,
):
    window_tokens = window_blocks * key_block
    local_blocks = (
        window_blocks + sink_blocks + (query_block + key_block - 2) // key_block + 1
    )
    index = dataclasses.replace(
        cases.BASE,
        C=key_block,
        query_block=query_block,
        open_tokens=open_tokens,
        sink_tokens=sink_blocks * key_block,
        A=choices,
        J=local_blocks + room,
        route_tokens=query_block,
    )
    T, B, G = 96, 1, 2
    position_BT = cases.positions(jax.random.key(seed), B, T, documents)
    view = cases.window_view(position_BT, window_tokens, index)
    start_T = np.asarray(view.start_BT[0])
    random = np.random.default_rng(seed)
    choice_BGTA = np.full((B, G, T, choices), -1, np.int32)
    for g, t in np.ndindex(G, T):
        candidates = reference.open_blocks(t, start_T[t], window_tokens, index)
        picked = random.permutation(candidates)[:choices]
        choice_BGTA[0, g, t, : len(picked)] = picked

    unite_jit = jax.jit(unite.unite, static_argnums=(2, 3))
    lists, refused_BGQ = unite_jit(jnp.asarray(choice_BGTA), view, index, G)
    lists, refused_BGQ = jax.device_get((lists, refused_BGQ))
    read_BT = np.zeros((G, T))
    for g, q in np.ndindex(G, T // query_block):
        chosen = [[n for n in row if n >= 0] for row in choice_BGTA[0, g].tolist()]
        expected = reference.unite(chosen, start_T, window_tokens, index)[q]
        ids = lists.block_id_BGQJ[0, g, q].tolist()
        count = int(lists.count_BGQ[0, g, q])
        assert ids[:count] == list(expected) and set(ids[count:]) <= {-1}
        wanted = {
            n
            for u in range(
                max(0, q * query_block - open_tokens + 1), (q + 1) * query_block
            )
            for n in chosen[u]
        }
        locals_ = set().union(
            *(
                reference.local_blocks(t, start_T[t], window_tokens, index)
                for t in range(q * query_block, (q + 1) * query_block)
            )
        )
        assert int(refused_BGQ[0, g, q]) == len(wanted - locals_) - (
            count - len(locals_)
        )
        for n, mask in zip(ids[:count], lists.token_mask_BGQJ[0, g, q].tolist()):
            readers = {q * query_block + t for t in range(query_block) if mask >> t & 1}
            assert readers == expected[n], (g, q, n)
            for t in readers:
                first = max(n * key_block, start_T[t])
                read_BT[g, t] += max(0, min(t, (n + 1) * key_block - 1) - first + 1)
    np.testing.assert_allclose(
        metrics.attended_tokens(lists, view.start_BT)[0], read_BT.mean(0)
    )


def test_lists_of_a_window_need_no_choices():
    position_BT = cases.positions(jax.random.key(3), 2, 64, 2)
    view = cases.window_view(position_BT, 8, cases.BASE)
    lists, refused_BGQ = unite.unite(None, view, cases.BASE, 1)
    assert not refused_BGQ.any()
    for b, q in np.ndindex(2, 8):
        tokens = range(8 * q, 8 * q + 8)
        reads = [
            reference.local_blocks(t, int(view.start_BT[b, t]), 8, cases.BASE)
            for t in tokens
        ]
        entries = zip(
            lists.block_id_BGQJ[b, 0, q].tolist(),
            lists.token_mask_BGQJ[b, 0, q].tolist(),
        )
        read = {n: mask for n, mask in entries if n >= 0}
        assert set(read) == set().union(*reads)
        assert all(
            (mask >> i & 1) == (n in reads[i])
            for n, mask in read.items()
            for i in range(8)
        )


def test_chunks_read_their_own_chunk_only():
    position_BT = cases.positions(jax.random.key(5), 2, 64, 3)
    view = local.chunk(position_BT, 10, 4)
    lists, _ = unite.unite(None, view, cases.BASE, 1)
    segment_BT = np.asarray(local.chunk_segments(position_BT, 10))
    for b, t in np.ndindex(2, 64):
        q, bit = divmod(t, 8)
        entries = zip(
            lists.block_id_BGQJ[b, 0, q].tolist(),
            lists.token_mask_BGQJ[b, 0, q].tolist(),
        )
        read = {
            s
            for n, mask in entries
            if n >= 0 and mask >> bit & 1
            for s in range(4 * n, 4 * n + 4)
        }
        seen = {s for s in read if s <= t and segment_BT[b, s] == segment_BT[b, t]}
        assert seen == set(range(t - int(position_BT[b, t]) % 10, t + 1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"J": 2}, "cannot hold"),
        ({"query_block": 24}, "no multiple of query_block"),
    ],
)
def test_impossible_lists_say_why(change, message):
    index = dataclasses.replace(cases.BASE, route_tokens=24, **change)
    view = cases.window_view(jnp.arange(64, dtype=jnp.int32)[None], 8, index)
    with pytest.raises(ValueError, match=message):
        unite.unite(jnp.zeros((1, 1, 64, 2), jnp.int32), view, index, 1)
