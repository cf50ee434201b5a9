"""Where keys and values are kept changes how many bytes they take, and nothing or little of what is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.decode import cache as caches
from bsa.decode import files, host, step
from bsa.decode.settings import STORES, CacheSettings
from tests.bsa.decode import cases

MODEL = cases.bookmarks_only("n", A=1, open_tokens=4, query_block=4)
FOLLOWED = dataclasses.replace(
    MODEL, L=2, pattern="bf", positions="nn", window_tokens=(16, 16)
)
ROOM = CacheSettings(320, 64)


def decoded(cache, token_BT, model=MODEL):
    """Logits after each of the last tokens, and the cache; the others are read in pieces, the second row behind."""
    params, logits = cases.parameters(model), []
    for begin in range(0, 200, 40):
        part_BT = token_BT[:, begin : begin + 40]
        last, cache = step.prefill(params, part_BT, cache, model, count_B=[40, 33])
        logits.append(last)
    for place in range(200, 220):
        token_B = jnp.asarray(token_BT[:, place])
        last, _, cache = step.decode_step(params, token_B, cache, model)
        logits.append(last)
    return np.stack(logits), cache


def test_stores_agree(tmp_path):
    """On the host bit for bit, also from a file; in int8 to a hundredth of the logits' spread."""
    token_BT = cases.tokens(5)
    found, cache = {}, {}
    for store in STORES:
        room = dataclasses.replace(ROOM, store=store)
        empty = caches.empty(FOLLOWED, room, 2)
        found[store], cache[store] = decoded(empty, token_BT, FOLLOWED)
    np.testing.assert_array_equal(found["host"], found["model"])
    gap = np.abs(found["int8"] - found["model"]).max()
    assert 0 < gap < 0.01 * np.ptp(found["model"])
    sizes = {store: caches.num_bytes(kept) for store, kept in cache.items()}
    assert sizes["host"] < sizes["int8"] < sizes["model"]

    params = cases.parameters(FOLLOWED)
    mark = files.fingerprint(params, FOLLOWED)
    files.save(tmp_path / "host.npz", cache["host"], token_BT[:, :220], mark)
    loaded = files.load(tmp_path / "host.npz", token_BT, FOLLOWED, mark)
    token_B = jnp.asarray(token_BT[:, 220])
    ours, _, _ = step.decode_step(params, token_B, loaded, FOLLOWED)
    theirs, _, _ = step.decode_step(params, token_B, cache["host"], FOLLOWED)
    np.testing.assert_array_equal(ours, theirs)


def test_the_host_brings_a_block_once_and_none_that_is_near(monkeypatch):
    """Of a piece each listed block, of a token its own and those that the token before had not; always as they are now."""
    brought, move = [], host.move

    def note(blocks, *arguments):
        brought.append(np.asarray(arguments[-1]))
        return move(blocks, *arguments)

    monkeypatch.setattr(host, "move", note)
    B, G, N, C, K, J = 2, 2, 100, 4, 3, 20
    blocks, random = (
        host.HostBlocks((B, G, N, C, K), "float32"),
        np.random.default_rng(0),
    )
    kept_BGNCK, near = np.zeros((B, G, N, C, K), np.float32), blocks.near(J)
    ask, place, before = jax.jit(blocks.exchange), 0, None
    nothing = [set()] * (B * G)
    for T in (64, 1, 1, 1, 40, *[1] * 20):
        k_BTGK = random.normal(size=(B, T, G, K)).astype(np.float32)
        place_BT = np.broadcast_to(place + np.arange(T, dtype=np.int32), (B, T))
        new = k_BTGK, -k_BTGK, place_BT, np.ones((B, T), bool)
        block_id, offset = np.divmod(place_BT[0], C)
        for token in range(T):
            kept_BGNCK[:, :, block_id[token], offset[token]] = k_BTGK[:, token]
        place += T
        # Some of them again, as a text's lists have them; a list's last entries name nothing.
        some = random.integers(place // C + 1, size=(B, G, 1 if T == 1 else 9, J - 3))
        some[..., :8] = np.arange(8) * place // C // 8
        some[..., 8] = block_id[-1]
        block_id_BGQJ = np.concatenate([some, np.full_like(some[..., :2], -1)], axis=-1)
        brought.clear()
        k, v, near = jax.block_until_ready(
            ask(new, block_id_BGQJ.astype(np.int32), near)
        )
        for row, group in np.ndindex(B, G):
            expected = kept_BGNCK[row, group][some[row, group]]
            np.testing.assert_array_equal(k[row, group, :, : J - 3], expected)
            np.testing.assert_array_equal(v[row, group, :, : J - 3], -expected)
        listed = [set(ids.ravel().tolist()) for ids in some.reshape(B * G, -1)]
        had = before if T == 1 else nothing
        wanted = [now - old | {block_id[-1]} for now, old in zip(listed, had)]
        (id_BGX,) = brought
        for ids, needed in zip(id_BGX.reshape(B * G, -1), wanted):
            assert needed <= set(ids.tolist()) <= needed | {0, N - 1}
        most = max(map(len, wanted))
        assert most <= id_BGX.shape[2] <= max(8, 8 * most)
        before = listed if T == 1 else nothing


def test_bytes_per_token_are_those_of_the_arrays():
    """Growing the capacity by a token grows the cache by so many bytes; int8 saves over 40% of bfloat16's."""
    model = dataclasses.replace(cases.MIXED, dtype="bfloat16", K=64)
    index = dataclasses.replace(model.index, route="chapters")
    model = dataclasses.replace(model, index=index)
    kv_bytes = {}
    for store in ("model", "int8"):
        low, high = (CacheSettings(n, 4, store=store) for n in (720, 1440))
        sizes = [
            sum(
                x.size * x.dtype.itemsize
                for x in jax.tree.leaves(
                    jax.eval_shape(lambda room=room: caches.empty(model, room, 1))
                )
            )
            for room in (low, high)
        ]
        rows = caches.bytes_per_token(model, low)
        assert [row["kind"] for row in rows] == list("dscwbf")
        assert [row["kind"] for row in rows if row["kv_bytes"]] == list("dbf")
        assert [row["kind"] for row in rows if row["index_bytes"]] == ["b"]
        total = sum(row["kv_bytes"] + row["index_bytes"] for row in rows)
        assert sizes[1] - sizes[0] == pytest.approx(total * 720)
        kv_bytes[store] = rows[0]["kv_bytes"]
    assert kv_bytes["model"] == 2 * 2 * 64 * 2
    assert kv_bytes["int8"] < 0.6 * kv_bytes["model"]


def test_exact_keys_cannot_stay_on_the_host():
    with pytest.raises(ValueError, match="set X to 0"):
        caches.empty(cases.CHAPTERS, dataclasses.replace(ROOM, store="host"), 1)


def test_layers_that_read_twice_stay_on_the_device():
    twice = dataclasses.replace(MODEL, ask_again=True)
    with pytest.raises(ValueError, match="reads twice keeps all blocks"):
        caches.empty(twice, dataclasses.replace(ROOM, store="host"), 1)


def test_means_of_values_are_not_kept():
    with pytest.raises(ValueError, match="branch_gates=True is for training and eval"):
        caches.empty(dataclasses.replace(MODEL, branch_gates=True), ROOM, 1)


def test_blocks_that_nobody_chooses_make_room():
    """A new block takes the slot of the one that was chosen longest ago, as a replay in Python has it.

    All bookmarks stay, and nothing is read that is not kept. As long as all blocks find room, nothing differs.
    """
    params, token_BT = cases.parameters(MODEL), cases.tokens(6)
    plain, whole = decoded(caches.empty(MODEL, ROOM, 2), token_BT)
    room = dataclasses.replace(ROOM, kept_tokens=200)
    found, cache = decoded(caches.empty(MODEL, room, 2), token_BT)
    np.testing.assert_array_equal(found[:5], plain[:5])
    window, sinks, gone = 4, 1, 0
    for place in range(220, 250):
        before = jax.device_get(cache.layers[0].pages)
        token_B = jnp.asarray(token_BT[:, place])
        _, readings, cache = step.decode_step(params, token_B, cache, MODEL)
        after, reading = jax.device_get((cache.layers[0].pages, readings[0]))
        for group in range(MODEL.G):
            owner, used = before.owner_BGS[0, group].copy(), before.used_BGS[0, group]
            if place % 4 == 0:
                free = (owner >= sinks) & (owner < place // 4 - window + 1)
                oldest = np.flatnonzero(free)[used[free].argmin()]
                owner[oldest] = place // 4
                gone += 1
            np.testing.assert_array_equal(after.owner_BGS[0, group], owner)
            slot_N = after.slot_BGN[0, group]
            np.testing.assert_array_equal(np.flatnonzero(slot_N >= 0), np.sort(owner))
            np.testing.assert_array_equal(owner[slot_N[owner]], owner)
            read = reading.block_id_BGJ[0, group]
            assert set(read[read >= 0].tolist()) <= set(owner.tolist())
            chosen = reading.choice_BGA[0, group]
            times = after.used_BGS[0, group][slot_N[chosen[chosen >= 0]]]
            assert (times == place).all()
    assert gone == 16
    kept, every = (
        x.layers[0].index.bookmarks.point_BGMRK[0, :, :55] for x in (cache, whole)
    )
    np.testing.assert_array_equal(kept, every)


@pytest.mark.parametrize(
    "model, kept, message",
    [(MODEL, 64, "kept_tokens=64; sinks"), (FOLLOWED, 200, "f layers keep all")],
)
def test_too_few_blocks_to_keep_are_refused(model, kept, message):
    with pytest.raises(ValueError, match=message):
        caches.empty(model, dataclasses.replace(ROOM, kept_tokens=kept), 1)
