"""The jitted index equals the NumPy loops, on random sizes, documents and keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsa.index import build, digest, local, metrics, reference, route, unite
from bsa.index.settings import IndexSettings

BASE = IndexSettings(
    C=4,
    query_block=8,
    J=24,
    sink_tokens=4,
    R=2,
    lloyd_steps=2,
    A=2,
    open_tokens=6,
    X=0,
    query_pool="mean",
    route_tokens=16,
)


def positions(key, batch, tokens, documents):
    """Positions of rows cut into random documents."""
    cuts = jax.random.randint(key, (batch, documents), 0, tokens)
    begins = (
        jnp.zeros((batch, tokens), bool).at[jnp.arange(batch)[:, None], cuts].set(True)
    )
    place = jnp.arange(tokens)
    start = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    return (place - start).astype(jnp.int32)


def window_view(position_BT, window_tokens, index):
    return local.window(
        position_BT,
        window_tokens=window_tokens,
        sink_tokens=index.sink_tokens,
        key_block=index.C,
    )


@pytest.mark.parametrize("points", [1, 2, 4, 8])
def test_clusters(points):
    k_BGNCK = jax.random.normal(jax.random.key(points), (2, 2, 3, 8, 5))
    point_BGNRK, log_count_BGNR = jax.jit(digest.cluster, static_argnums=(1, 2))(
        k_BGNCK, points, 2
    )
    for b, g, n in np.ndindex(2, 2, 3):
        point_RK, count_R = reference.cluster(k_BGNCK[b, g, n], points, 2)
        np.testing.assert_allclose(point_BGNRK[b, g, n], point_RK, atol=1e-5)
        np.testing.assert_allclose(np.exp(log_count_BGNR[b, g, n]), count_R, atol=1e-5)


def test_equal_keys_make_one_cluster():
    point, log_count = digest.cluster(jnp.ones((1, 1, 1, 8, 3)), 4, 2)
    np.testing.assert_allclose(point[0, 0, 0, 0], 1)
    np.testing.assert_array_equal(np.exp(log_count[0, 0, 0]), [8, 0, 0, 0])


@pytest.mark.parametrize("query_pool", ["mean", "heads"])
@pytest.mark.parametrize("shortlist", [0, 5])
def test_choices(query_pool, shortlist):
    index = dataclasses.replace(BASE, query_pool=query_pool, X=shortlist, A=3)
    B, T, H, G, K, window_tokens = 2, 64, 4, 2, 8, 8
    keys = jax.random.split(jax.random.key(7), 3)
    q_BTHK = jax.random.normal(keys[0], (B, T, H, K))
    k_BSGK = jax.random.normal(keys[1], (B, T, G, K))
    position_BT = positions(keys[2], B, T, 2)
    view = window_view(position_BT, window_tokens, index)
    bookmarks = build.build_index(k_BSGK, index)
    choice_BGTA = jax.jit(route.choose_blocks, static_argnames=("index", "scale"))(
        q_BTHK, k_BSGK, bookmarks, view, index=index, scale=0.5
    )
    for b, g, t in np.ndindex(B, G, T):
        expected = reference.choose(
            t,
            int(view.start_BT[b, t]),
            q_BTHK[b, :, 2 * g : 2 * g + 2],
            k_BSGK[b, :, g],
            window_tokens,
            index,
            0.5,
        )
        assert [n for n in choice_BGTA[b, g, t].tolist() if n >= 0] == expected, (
            b,
            g,
            t,
        )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
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
        BASE,
        C=key_block,
        query_block=query_block,
        open_tokens=open_tokens,
        sink_tokens=sink_blocks * key_block,
        A=choices,
        J=local_blocks + room,
        route_tokens=query_block,
    )
    T, B, G = 96, 1, 2
    position_BT = positions(jax.random.key(seed), B, T, documents)
    view = window_view(position_BT, window_tokens, index)
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
    position_BT = positions(jax.random.key(3), 2, 64, 2)
    view = window_view(position_BT, 8, BASE)
    lists, refused_BGQ = unite.unite(None, view, BASE, 1)
    assert not refused_BGQ.any()
    for b, q in np.ndindex(2, 8):
        tokens = range(8 * q, 8 * q + 8)
        reads = [
            reference.local_blocks(t, int(view.start_BT[b, t]), 8, BASE) for t in tokens
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
    position_BT = positions(jax.random.key(5), 2, 64, 3)
    view = local.chunk(position_BT, 10, 4)
    lists, _ = unite.unite(None, view, BASE, 1)
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


def test_bookmark_use_counts_even_and_dead_bookmarks():
    view = window_view(jnp.arange(32, dtype=jnp.int32)[None], 4, BASE)
    even = jnp.asarray([[[[1 + t % 6] for t in range(32)]]], jnp.int32)
    entropy, unread = metrics.bookmark_use(even, view, 8)
    assert unread == 0 and 1.7 < entropy <= np.log(6) + 1e-6
    entropy, unread = metrics.bookmark_use(jnp.ones_like(even), view, 8)
    assert entropy == 0 and np.isclose(unread, 5 / 6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"J": 2}, "cannot hold"),
        ({"query_block": 24}, "no multiple of query_block"),
    ],
)
def test_impossible_lists_say_why(change, message):
    index = dataclasses.replace(BASE, route_tokens=24, **change)
    view = window_view(jnp.arange(64, dtype=jnp.int32)[None], 8, index)
    with pytest.raises(ValueError, match=message):
        unite.unite(jnp.zeros((1, 1, 64, 2), jnp.int32), view, index, 1)
