"""The decoder as a whole: causality, documents, and kinds of layers that must agree."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.model import decoder, dense, layers, rope
from tests.bsa.model.cases import INDEX, MODEL

T = 64


def with_pattern(pattern, **changes):
    """MODEL with another pattern, RoPE and NoPE by turns."""
    positions = "".join("rn"[i % 2] for i in range(len(pattern)))
    repeated = len(pattern) if len(pattern) > 1 else 2
    return dataclasses.replace(
        MODEL,
        pattern=pattern,
        positions=positions,
        L=repeated,
        window_tokens=(16,) * len(pattern),
        **changes,
    )


@functools.cache
def parameters(model):
    """Parameters large enough that attention and routing are far from uniform."""
    params = decoder.init(jax.random.key(0), model)
    return jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)


@functools.partial(jax.jit, static_argnames="model")
def logits(params, tokens, segments, positions, model):
    hidden, _ = decoder.apply(params, tokens, segments, positions, model)
    return hidden @ params["embedding_VD"].T


def one_document(batch=2):
    segments = jnp.ones((batch, T), jnp.int32)
    return segments, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (batch, T))


SHORTLIST = dataclasses.replace(INDEX, X=4, query_pool="heads")
BIASED = {"score_weight": 0.5, "mass_weight": 0.75}
CROWDED = dataclasses.replace(INDEX, J=8, A=4)
LEARNED = dataclasses.replace(INDEX, span_blocks=3, spans="learned")
NSA = dataclasses.replace(INDEX, digest="submeans", R=1, query_pool="heads")


@pytest.mark.parametrize(
    "model",
    [
        with_pattern("d"),
        with_pattern("s"),
        with_pattern("w"),
        with_pattern("c"),
        with_pattern("b"),
        with_pattern("wb"),
        with_pattern("dcwb"),
        with_pattern("bf", remat="layer"),
        with_pattern("b", index=SHORTLIST),
        with_pattern("b", index=CROWDED, G=4, route_width=4, route_taps=3, **BIASED),
        with_pattern("b", index=NSA, branch_gates=True),
        with_pattern("wb", ask_again=True, remat="layer", index=LEARNED),
    ],
    ids=[
        *("d", "s", "w", "c", "b", "wb", "dcwb", "bf"),
        *("b-shortlist", "b-crowded", "b-gates", "wb-again-spans"),
    ],
)
def test_no_token_sees_a_later_one(model):
    """Changing token t changes no logit before t, bit for bit, and does change the one at t."""
    tokens = jax.random.randint(jax.random.key(1), (1, T), 0, MODEL.V)
    segments, positions = one_document(1)
    before = np.asarray(
        logits(parameters(model), tokens, segments, positions, model=model)
    )
    for t in range(T):
        changed = tokens.at[0, t].set((tokens[0, t] + 1) % MODEL.V)
        after = np.asarray(
            logits(parameters(model), changed, segments, positions, model=model)
        )
        np.testing.assert_array_equal(after[0, :t], before[0, :t], err_msg=f"token {t}")
        assert (after[0, t] != before[0, t]).any()


@pytest.mark.parametrize("pattern", ["d", "s", "w", "c", "b", "dcwb"])
def test_packed_documents_do_not_meet(pattern):
    """A document's logits are the same alone and behind another one in the row."""
    model = with_pattern(pattern)
    params = parameters(model)
    tokens = jax.random.randint(jax.random.key(2), (1, T), 0, MODEL.V)
    cut = 24  # whole blocks: inside one, bookmarks would summarise other tokens
    segments = jnp.where(jnp.arange(T) < cut, 1, 2)[None]
    place = jnp.arange(T)
    positions = jnp.where(place < cut, place, place - cut)[None]
    packed = logits(params, tokens, segments, positions, model=model)[:, cut:]
    alone_tokens = jnp.pad(tokens[:, cut:], ((0, 0), (0, cut)))
    alone = logits(params, alone_tokens, *one_document(1), model=model)[:, : T - cut]
    np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=1e-4)


def test_reading_every_block_is_dense():
    """A window, a chunk or a budget of choices as long as the text reads what dense attention reads."""
    everything = dataclasses.replace(INDEX, A=16, J=64)
    dense = with_pattern("dd")
    tokens = jax.random.randint(jax.random.key(3), (2, T), 0, MODEL.V)
    expected = logits(parameters(dense), tokens, *one_document(), model=dense)
    for pattern, changes in {
        "ss": {"window_tokens": (T, T)},
        "ww": {"window_tokens": (T, T)},
        "cc": {"chunk_tokens": T},
        "bf": {"index": everything, "window_tokens": (8, 8)},
    }.items():
        model = dataclasses.replace(dense, pattern=pattern, **changes)
        params = decoder.renamed(parameters(dense), pattern)
        found = logits(params, tokens, *one_document(), model=model)
        np.testing.assert_allclose(
            found, expected, rtol=1e-4, atol=1e-4, err_msg=pattern
        )


def test_rematerialising_changes_no_gradient():
    segments, positions = one_document()
    tokens = jax.random.randint(jax.random.key(4), (2, T), 0, MODEL.V)

    def gradient(remat):
        model = with_pattern("wb", remat=remat)
        loss = lambda params: (
            logits(params, tokens, segments, positions, model=model) ** 2
        ).mean()
        return jax.jit(jax.grad(loss))(parameters(with_pattern("wb")))

    plain = gradient("none")
    for remat in ("layer", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            gradient(remat),
            plain,
        )


def test_dense_attention_in_pieces_is_dense_attention(monkeypatch):
    keys = jax.random.split(jax.random.key(5), 3)
    q, k, v = (
        jax.random.normal(key, (2, 40, heads, 8)) for key, heads in zip(keys, (4, 2, 2))
    )
    segments = jnp.ones((2, 40), jnp.int32)
    whole = dense.attend(q, k, v, segments, 0.3)
    monkeypatch.setattr(dense, "QUERY_TOKENS", 3)
    np.testing.assert_allclose(dense.attend(q, k, v, segments, 0.3), whole, atol=1e-6)
    library = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    np.testing.assert_allclose(whole, library, atol=1e-6)


def test_figures_count_what_is_read():
    model = with_pattern("dcwbf")
    tokens = jnp.zeros((1, T), jnp.int32)
    _, figures = decoder.apply(parameters(model), tokens, *one_document(1), model)
    attended = {name: float(f["attended_tokens"].mean()) for name, f in figures.items()}
    place = np.arange(T)
    window = np.minimum(
        place + 1, 12 + place % 4 + 1 + np.minimum(4, np.maximum(place // 4 - 3, 0) * 4)
    )
    assert attended["0_d"] == (T + 1) / 2
    assert attended["1_c"] == (place % 20 + 1).mean()
    assert np.isclose(attended["2_w"], window.mean())
    assert attended["3_b"] == attended["4_f"]
    assert (
        attended["2_w"]
        <= attended["3_b"]
        <= attended["2_w"] + INDEX.A * INDEX.open_tokens * INDEX.C
    )


def test_teaching_reaches_the_index_and_nothing_else():
    """Where it has queries and keys of its own, and learned spans; a layer that follows teaches the index that it reads by."""
    segments, positions = one_document()
    tokens = jax.random.randint(jax.random.key(7), (2, T), 0, MODEL.V)
    own = {"route_width": 4, "route_taps": 2, "index": LEARNED}
    model = with_pattern("bf", taught_rows=16, **own)

    @jax.jit
    @jax.grad
    def gradient(params):
        _, figures = decoder.apply(params, tokens, segments, positions, model)
        return figures["1_f"]["selection_divergence"].sum()

    leaves = jax.tree_util.tree_leaves_with_path(gradient(parameters(model)))
    for at, leaf in leaves:
        names = jax.tree_util.keystr(at)
        taught = "layer_0_b" in names and ("route" in names or "span" in names)
        assert (np.abs(leaf).max() > 0) == taught, at


def test_noise_is_where_a_key_is_given():
    """The same for the same key, other for other keys; without one it is the program of a model without noise."""
    plain = with_pattern("b")
    model = dataclasses.replace(plain, score_noise=2.0)
    tokens = jax.random.randint(jax.random.key(9), (2, T), 0, MODEL.V)

    @jax.jit
    def noisy(seed):
        key = jax.random.key(seed)
        _, figures = decoder.apply(
            *(parameters(model), tokens, *one_document(), model), noise_key=key
        )
        return figures["0_b"]["selection"].block_id_BGQJ

    once, again, other = (np.asarray(noisy(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any((1, 2, 3, 4)).all()

    def program(model):
        args = parameters(plain), tokens, *one_document()
        traced = jax.make_jaxpr(lambda *args: decoder.apply(*args, model))(*args)
        return re.sub("0x[0-9a-f]+", "", str(traced))

    assert program(model) == program(plain)


def test_an_index_before_rope_gets_what_rope_turns():
    model = with_pattern("b", route_before_rope=True)
    x_BTD = jax.random.normal(jax.random.key(10), (2, T, model.D))
    segments, positions = one_document()
    layer = layers.Attention(model, 0, lambda heads, *_: (heads.q_BTHK, heads))
    (_, heads), _ = layer.init_with_output(
        *(jax.random.key(0), x_BTD, segments, positions)
    )
    for sought, used in zip(heads.sought, (heads.q_BTHK, heads.k_BSGK)):
        assert not np.allclose(sought, used)
        turned = rope.rotate(sought, positions, model.rope_theta, model.rope_scaling)
        np.testing.assert_array_equal(turned, used)


def test_rope_depends_on_distance_only():
    keys = jax.random.split(jax.random.key(6), 2)
    q, k = (jax.random.normal(key, (1, 1, 1, 8)) for key in keys)

    def score(query_at, key_at):
        turned = [
            rope.rotate(x, jnp.full((1, 1), at), 100.0)
            for x, at in ((q, query_at), (k, key_at))
        ]
        return float(jnp.vdot(*turned))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"H": 3}, "H=3 is no multiple of G=2"),
        ({"pattern": "wx"}, "letters other than"),
        ({"pattern": "wf"}, "f reads the lists of a b before it"),
        ({"pattern": "bf"}, "both have the same window"),
        ({"positions": "rr", "ask_again": True}, "set positions of b to n"),
        ({"L": 5}, "L=5 is no multiple"),
        ({"window_tokens": (16,)}, "one entry for each letter"),
        ({"window_tokens": (16, 6)}, "whole blocks"),
        ({"remat": "all"}, "remat='all'"),
        ({"temperature_tokens": -1}, "0 tokens is no temperature"),
        ({"score_noise": 1.0, "index": SHORTLIST}, "choose at once"),
        ({"route_before_rope": True, "index": SHORTLIST}, "reads attention's keys"),
        ({"route_before_rope": True, "route_width": 4}, "have no positions"),
        ({"mass_weight": 1.0}, "H=4, G=2: heads that share a list"),
        ({"span_mean_blocks": 3.0, "index": LEARNED}, "span_mean_blocks=3.0"),
        ({"route_taps": 2}, "set route_width"),
        ({"route_taps": 5, "route_width": 4}, "2 to C=4 keys"),
    ],
)
def test_impossible_sizes_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **change)
