"""Branches joined by gates: each is a softmax of its own, over what it should read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bsa.model import attention
from tests.bsa.model import cases

T, CUT = 64, 18
"""A row of two documents; the second begins inside a block."""
INDEX = dataclasses.replace(cases.INDEX, digest="submeans", R=1, query_pool="heads")
MODEL = dataclasses.replace(
    cases.MODEL,
    pattern="b",
    positions="n",
    window_tokens=(16,),
    index=INDEX,
    branch_gates=True,
)
C, H, G, K = INDEX.C, MODEL.H, MODEL.G, MODEL.K
PLACE_T, BLOCK_N = np.arange(T), np.arange(T // C)
START_T = np.where(PLACE_T < CUT, 0, CUT)


def local_blocks():
    """Window and sinks of each token, [T, N]."""
    own_T1, first_T1 = PLACE_T[:, None] // C, START_T[:, None] // C
    low_T1 = np.maximum(own_T1 - MODEL.window_tokens[0] // C + 1, first_T1)
    is_sink = (BLOCK_N >= first_T1) & (BLOCK_N < first_T1 + INDEX.sink_tokens // C)
    return ((BLOCK_N >= low_T1) | is_sink) & (BLOCK_N <= own_T1)


def read_blocks(lists):
    """What each token reads by its list, [G, T, N]."""
    id_GQJ, mask_GQJ = (
        np.asarray(x[0]) for x in (lists.block_id_BGQJ, lists.token_mask_BGQJ)
    )
    reads = np.zeros((G, *PLACE_T.shape, *BLOCK_N.shape), bool)
    for g, t in np.ndindex(G, T):
        list_id, bit = divmod(t, INDEX.query_block)
        reads[g, t, id_GQJ[g, list_id][(mask_GQJ[g, list_id] >> bit) & 1 > 0]] = True
    return reads


def softmax_over(sees_GTS, q_THK, k_SGK, v_SGK):
    """Attention by its definition; 0 where a token sees nothing."""
    k_SHK, v_SHK = (np.repeat(x, H // G, axis=1) for x in (k_SGK, v_SGK))
    s_HTS = np.einsum("THK,SHK->HTS", q_THK, k_SHK) * K**-0.5
    share = np.exp(s_HTS) * np.repeat(sees_GTS, H // G, axis=0)
    share /= np.maximum(share.sum(-1, keepdims=True), 1e-30)
    return np.einsum("HTS,SHK->THK", share, v_SHK)


def draw_heads():
    keys = jax.random.split(jax.random.key(8), 3)
    return [2 * jax.random.normal(x, (1, T, n, K)) for x, n in zip(keys, (H, G, G))]


def attend(row, gates):
    position_BT = jnp.asarray(PLACE_T - START_T, jnp.int32)[None]
    segment_id_BT = jnp.asarray(START_T, jnp.int32)[None]
    heads = attention.Heads(*row, row[:2], gates)
    return attention.attend(heads, segment_id_BT, position_BT, MODEL, 0)


def test_gradients_are_numbers_where_no_block_is_complete(monkeypatch):
    """By a library whose softmax of no key at all is NaN, as cuDNN's."""
    library = jax.nn.dot_product_attention

    def of_some_key(*row, mask, scale, **_):
        out_BTHK = library(*row, mask=mask, scale=scale)
        return out_BTHK * jnp.where(mask.any(-1)[:, 0, :, None, None], 1, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", of_some_key)
    gates = [jnp.ones((1, T, H))] * 3
    gradients = jax.grad(lambda row: attend(row, gates)[0].sum())(draw_heads())
    assert all(jnp.isfinite(x).all() for x in gradients)


def test_each_gate_lets_one_branch_through():
    """Means of complete blocks, what was chosen, and what is read anyway; and the keys of all three are counted."""
    row = draw_heads()
    attend_by = jax.jit(lambda gates: attend(row, gates))
    shut, wide = jnp.zeros((1, T, H)), jnp.ones((1, T, H))
    (means, figures), (chosen, _), (nearby, _), (half, _) = (
        attend_by(gates)
        for gates in (
            *((wide, shut, shut), (shut, wide, shut), (shut, shut, wide)),
            (wide / 2, wide / 2, wide / 2),
        )
    )
    np.testing.assert_allclose(half, (means + chosen + nearby) / 2, atol=1e-5)

    is_local, reads = local_blocks(), read_blocks(figures["selection"])
    is_chosen = reads & ~is_local
    assert is_chosen.any() and (reads >= is_local).all()
    row = [np.asarray(x[0]) for x in row]
    sees = (PLACE_T <= PLACE_T[:, None]) & (START_T == START_T[:, None])
    for found, blocks in ((chosen, is_chosen), (nearby, reads & is_local)):
        tokens = np.repeat(blocks, C, axis=-1) & sees
        np.testing.assert_allclose(found[0], softmax_over(tokens, *row), atol=1e-5)

    is_whole = BLOCK_N * C >= START_T[:, None]
    is_whole &= (BLOCK_N + 1) * C <= PLACE_T[:, None] + 1
    mean_keys = [x.reshape(-1, C, G, K).mean(1) for x in row[1:]]
    expected = softmax_over(np.tile(is_whole, (G, 1, 1)), row[0], *mean_keys)
    np.testing.assert_allclose(means[0], expected, atol=1e-5)
    counted = (np.repeat(reads, C, axis=-1) & sees).sum() / G + is_whole.sum()
    np.testing.assert_allclose(figures["attended_tokens"], counted / T, rtol=1e-5)
