"""Decoding on a Hopper GPU: each sequence at its own length, the same in pieces; interpreted without a card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    BlockSelection,
    block_sparse_attention,
    mosaic_gpu,
    mosaic_gpu_decode,
    tiles,
)
from tests.pallas_kernels import cases, h100, tolerance

SCALE = 0.125


def _compile(interpret=None):
    """Decoding, compiled anew: `tiles` may have changed."""
    if interpret is None and not mosaic_gpu.is_hopper(jax.devices()[0]):
        interpret = plgpu.InterpretGPUParams()

    @jax.jit
    def attend(inputs, position_B):
        return mosaic_gpu_decode.attend(
            *inputs[:3], inputs.selection, position_B, scale=SCALE, interpret=interpret
        )

    return attend


def _assert_is_attention(results, inputs, position_B, case):
    """Of each sequence alone, by the oracle."""
    for b, position in enumerate(position_B):
        one = jax.tree.map(lambda x, b=b: x[b : b + 1], (*inputs[:3], inputs.selection))
        expected = block_sparse_attention(
            *one, scale=SCALE, query_offset=position, implementation="reference"
        )
        for name, x, y in zip(("out", "lse"), results, expected):
            tolerance.assert_close(
                x[b : b + 1], y, dtype=case.dtype, length=128, name=name
            )


def test_decoding_is_attention_of_each_sequence_at_its_own_length(monkeypatch):
    monkeypatch.setattr(tiles, "hopper_pieces", lambda *_: 4)
    case = cases.Case("decode", B=2, T=2, S=200, H=4, G=2, J=8, K=64, dtype="bfloat16")
    inputs, position_B = cases.make_inputs(case), jnp.asarray([57, 160])
    results = _compile()(inputs, position_B)
    _assert_is_attention(results, inputs, position_B, case)


def test_later_tokens_change_no_bit_of_earlier_ones(monkeypatch):
    """Neither their queries, nor what they list, nor keys behind the first token.

    Three heads and tokens fill neither copies nor tiles; a piece more or less is read.
    """
    monkeypatch.setattr(tiles, "hopper_pieces", lambda *_: 4)
    case = cases.Case(
        *("tokens", 1, 3, 300, 3, 1, 64, 16), dtype="bfloat16", token_mask=True
    )
    inputs, position_B = cases.make_inputs(case), jnp.asarray([250])
    attend, J = _compile(), case.J
    block_id_J = jnp.arange(J, dtype=jnp.int32)[::-1]
    # The first token reads half of the list; the others read a half, and then all of it.
    mask_J = jnp.where(jnp.arange(J) < J // 2, 7, 6).astype(jnp.uint32)
    future_S = (jnp.arange(case.S) > 250)[:, None, None]

    def cut(count):
        lists = BlockSelection(
            block_id_J[None, None, None],
            jnp.full((1, 1, 1), count, jnp.int32),
            *(mask_J[None, None, None], 16, 16),
        )
        return inputs._replace(selection=lists)

    results = attend(cut(J // 2), position_B)
    _assert_is_attention(results, cut(J // 2), position_B, case)
    changed = cut(J)._replace(
        q_BTHK=inputs.q_BTHK.at[:, 1:].multiply(-3),
        k_BSGK=jnp.where(future_S, 7 - inputs.k_BSGK, inputs.k_BSGK),
        v_BSGK=jnp.where(future_S, 1000, inputs.v_BSGK),
    )
    before, after = results[0], attend(changed, position_B)[0]
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert (before[:, 1:] != after[:, 1:]).any()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="sees no races before 0.12")
def test_pieces_meet_without_races(monkeypatch):
    """A ring that goes round, and pieces that hand over more than a tile of rows."""
    monkeypatch.setattr(tiles, "hopper_pieces", lambda *_: 2)
    monkeypatch.setattr(
        tiles, "hopper_decode", lambda _: tiles.HopperDecodeTiles(1, 128, 40)
    )
    case = cases.Case("raced", T=16, S=300, H=4, J=16, K=64, dtype="bfloat16")
    inputs, position_B = cases.make_inputs(case), jnp.asarray([280])
    attend = _compile(plgpu.InterpretGPUParams(detect_races=True))
    results = attend(inputs, position_B)
    _assert_is_attention(results, inputs, position_B, case)


def test_a_step_is_one_launch():
    """At the sizes of `experiments/bench_decode.py`, one sequence and eight, compiled."""
    mesh = h100.mesh()

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    for B in (1, 8):
        lists = BlockSelection(
            shape(jnp.int32, B, 4, 1, 160), shape(jnp.int32, B, 4, 1), None, 16, 16
        )
        kv_BSGK = shape(jnp.bfloat16, B, 2**20, 4, 128)
        compiled = h100.compile_for(
            mesh,
            lambda *arrays: mosaic_gpu_decode.attend(
                *arrays, scale=SCALE, interpret=False
            )[0],
            *(shape(jnp.bfloat16, B, 1, 16, 128), kv_BSGK, kv_BSGK, lists),
            shape(jnp.int32, B),
        )
        text = compiled.as_text()
        assert text.count('custom_call_target="mosaic_gpu') == 1
        assert " fusion(" not in text and " copy(" not in text
