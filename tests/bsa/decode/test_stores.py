"""Where keys and values are kept changes how many bytes they take, and nothing or little of what is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.decode import cache as caches
from bsa.decode import files, step
from bsa.decode.settings import STORES, CacheSettings
from tests.bsa.decode import cases

MODEL = cases.bookmarks_only("n")
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
        empty = caches.empty(MODEL, room, 2)
        found[store], cache[store] = decoded(empty, token_BT)
    np.testing.assert_array_equal(found["host"], found["model"])
    gap = np.abs(found["int8"] - found["model"]).max()
    assert 0 < gap < 0.01 * np.ptp(found["model"])
    sizes = {store: caches.num_bytes(kept) for store, kept in cache.items()}
    assert sizes["host"] < sizes["int8"] < sizes["model"]

    mark = files.fingerprint(cases.parameters(MODEL), MODEL)
    files.save(tmp_path / "host.npz", cache["host"], token_BT[:, :220], mark)
    loaded = files.load(tmp_path / "host.npz", token_BT, MODEL, mark)
    token_B = jnp.asarray(token_BT[:, 220])
    params = cases.parameters(MODEL)
    ours, _, _ = step.decode_step(params, token_B, loaded, MODEL)
    theirs, _, _ = step.decode_step(params, token_B, cache["host"], MODEL)
    np.testing.assert_array_equal(ours, theirs)


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
        assert [row["kind"] for row in rows] == list("dcwb")
        assert [row["kv_bytes"] > 0 for row in rows] == [True, False, False, True]
        assert [row["index_bytes"] > 0 for row in rows] == [False, False, False, True]
        total = sum(row["kv_bytes"] + row["index_bytes"] for row in rows)
        assert sizes[1] - sizes[0] == pytest.approx(total * 720)
        kv_bytes[store] = rows[0]["kv_bytes"]
    assert kv_bytes["model"] == 2 * 2 * 64 * 2
    assert kv_bytes["int8"] < 0.6 * kv_bytes["model"]


def test_exact_keys_cannot_stay_on_the_host():
    with pytest.raises(ValueError, match="set X to 0"):
        caches.empty(cases.CHAPTERS, dataclasses.replace(ROOM, store="host"), 1)
