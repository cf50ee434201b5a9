"""What `mosaic_gpu` promises beyond agreeing with the oracle; interpreted without a card."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    block_sparse_attention,
    dispatch,
    mosaic_gpu,
    mosaic_gpu_backward,
    tiles,
)
from pallas_kernels.options import Options
from tests.pallas_kernels import cases, tolerance

CASE = cases.Case(
    "mosaic_gpu", T=53, S=53, H=4, G=2, dtype="bfloat16", token_mask=True, empty=0.2
)


@functools.cache
def _compiled(case, implementation):
    return jax.jit(lambda inputs: cases.attend(case, inputs, implementation))


def _attend(inputs, case=CASE):
    return _compiled(case, "mosaic_gpu")(inputs)


@pytest.mark.parametrize("token_mask", [True, False])
def test_future_keys_change_no_bit_of_the_past(token_mask):
    case, cut = dataclasses.replace(CASE, token_mask=token_mask), 29
    inputs = cases.make_inputs(case)
    future_S = (jnp.arange(CASE.S) > cut)[:, None, None]
    before = _attend(inputs, case)
    after = _attend(
        inputs._replace(
            k_BSGK=jnp.where(future_S, 7 - inputs.k_BSGK, inputs.k_BSGK),
            v_BSGK=jnp.where(future_S, 1000, inputs.v_BSGK),
        ),
        case,
    )
    np.testing.assert_array_equal(before[0][:, : cut + 1], after[0][:, : cut + 1])
    np.testing.assert_array_equal(before[1][..., : cut + 1], after[1][..., : cut + 1])
    assert (before[0][:, cut + 1 :] != after[0][:, cut + 1 :]).any()


@functools.cache
def _compiled_gradient(case, implementation):
    def run(arrays, inputs, cotangents):
        def attend(arrays):
            return cases.attend(case, inputs._replace(**arrays), implementation)

        return jax.vjp(attend, arrays)[1](cotangents)[0]

    return jax.jit(run)


def _differentiate(inputs, cotangents, case=CASE, implementation="mosaic_gpu"):
    """Gradients of q, k and v."""
    arrays = {name: getattr(inputs, name) for name in ("q_BTHK", "k_BSGK", "v_BSGK")}
    return _compiled_gradient(case, implementation)(arrays, inputs, cotangents)


def test_future_tokens_change_no_bit_of_the_gradient_of_past_losses():
    inputs, cut = cases.make_inputs(CASE), 29
    past_T = (jnp.arange(CASE.T) <= cut)[:, None, None]
    d_out_BTHK, d_lse_BHT = cases.make_cotangents(CASE)
    cotangents = (
        jnp.where(past_T, d_out_BTHK, 0),
        jnp.where(past_T[:, 0, 0], d_lse_BHT, 0),
    )
    before = _differentiate(inputs, cotangents)
    changed = inputs._replace(
        q_BTHK=jnp.where(past_T, inputs.q_BTHK, 3 - inputs.q_BTHK),
        k_BSGK=jnp.where(past_T, inputs.k_BSGK, 7 - inputs.k_BSGK),
        v_BSGK=jnp.where(past_T, inputs.v_BSGK, 100),
    )
    after = _differentiate(changed, cotangents)
    for name, gradient in before.items():
        np.testing.assert_array_equal(gradient, after[name], err_msg=name)
        assert (gradient[:, cut + 1 :] == 0).all(), name
        assert (gradient[:, : cut + 1] != 0).any(), name


def test_pieces_of_a_row_add_up(monkeypatch):
    """A block that all query blocks read, in pieces of four readers."""
    sizes = dataclasses.replace(tiles.hopper_dkv(64), piece_steps=4)
    monkeypatch.setattr(tiles, "hopper_dkv", lambda K: sizes)
    case = cases.Case("sink", T=90, S=40, J=3, dtype="bfloat16", causal=False)
    inputs, cotangents = cases.make_inputs(case), cases.make_cotangents(case)
    selection = inputs.selection
    everything = dataclasses.replace(
        selection,
        block_id_BGQJ=jnp.broadcast_to(jnp.arange(3), selection.block_id_BGQJ.shape),
        count_BGQ=jnp.full_like(selection.count_BGQ, 3),
    )
    inputs = inputs._replace(selection=everything)
    actual, expected = (
        _differentiate(inputs, cotangents, case, name)
        for name in ("mosaic_gpu", "reference")
    )
    for name in expected:
        tolerance.assert_close(
            actual[name], expected[name], dtype="bfloat16", length=180, name=name
        )


def test_derivatives_that_the_kernels_lack_are_known():
    for score_mod in (None, *cases.SCORE_MODS.values()):
        assert mosaic_gpu_backward.can_differentiate(score_mod)
    assert not mosaic_gpu_backward.can_differentiate(
        lambda s, b, h, q_id, k_id: jnp.arctan(s)
    )


def test_lists_in_any_order_agree():
    inputs = cases.make_inputs(dataclasses.replace(CASE, empty=0.0))
    selection = inputs.selection
    order_BGQJ = jnp.argsort(
        jnp.where(
            jnp.arange(CASE.J) < selection.count_BGQ[..., None],
            -selection.block_id_BGQJ,
            CASE.S,
        )
    )
    turned = dataclasses.replace(
        selection,
        block_id_BGQJ=jnp.take_along_axis(selection.block_id_BGQJ, order_BGQJ, -1),
        token_mask_BGQJ=jnp.take_along_axis(selection.token_mask_BGQJ, order_BGQJ, -1),
    )
    expected = _attend(inputs)
    for actual, x in zip(_attend(inputs._replace(selection=turned)), expected):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), np.asarray(x, np.float32), atol=2e-2
        )


def test_traced_offsets_equal_static_offsets():
    inputs = cases.make_inputs(CASE)

    def attend(query_offset, key_offset):
        return block_sparse_attention(
            *inputs[:3],
            inputs.selection,
            scale=0.25,
            query_offset=query_offset,
            key_offset=key_offset,
            implementation="mosaic_gpu",
        )

    static = jax.jit(lambda: attend(40, 25))()
    traced = jax.jit(attend)(jnp.int32(40), jnp.int32(25))
    for x, y in zip(traced, static):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_of_any_sign(scale):
    inputs = cases.make_inputs(CASE)
    out, expected = (
        block_sparse_attention(
            *inputs[:3], inputs.selection, scale=scale, implementation=name
        )[0]
        for name in ("mosaic_gpu", "reference")
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2
    )


RACED = {"J": 40, "S": 700, "T": 32, "dtype": "bfloat16", "causal": False}


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="sees no races before 0.12")
@pytest.mark.parametrize(
    "case",
    [
        cases.Case("teams", **RACED),
        cases.Case("turns", H=4, query_block=32, **RACED),
        cases.Case("bias_and_segments", bias=True, segments=2, **RACED),
    ],
    ids=str,
)
def test_stages_are_reused_without_races(monkeypatch, case):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    attend = functools.partial(mosaic_gpu.attend, interpret=interpret)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", attend)
    inputs = cases.make_inputs(case)
    gradients = _differentiate(inputs, cases.make_cotangents(case), case)
    assert all(jnp.isfinite(x).all() for x in gradients.values())


def test_a_score_mod_that_kernels_cannot_differentiate_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_backward, "ELEMENTWISE", frozenset())
    case = dataclasses.replace(CASE, score_mod="softcap", T=20, S=30, query_offset=10)
    inputs, cotangents = cases.make_inputs(case), cases.make_cotangents(case)
    actual, expected = (
        _differentiate(inputs, cotangents, case, name)
        for name in ("mosaic_gpu", "reference")
    )
    for name in expected:
        tolerance.assert_close(
            actual[name], expected[name], dtype="bfloat16", length=128, name=name
        )


def _refused(match, case=CASE, **options):
    """Asserts that a call raises NotImplementedError that says what to use instead."""
    inputs = cases.make_inputs(case)
    with pytest.raises(NotImplementedError, match=match) as refusal:
        dispatch.IMPLEMENTATIONS["mosaic_gpu"](
            *inputs[:3], inputs.selection, None, None, Options(scale=1.0, **options)
        )
    assert "implementation='xla'" in str(refusal.value)


def test_calls_that_the_kernel_lacks_are_refused():
    change = dataclasses.replace
    _refused("not float32", change(CASE, dtype="float32"))
    _refused("not K=320", change(CASE, K=320))
    _refused("not query_block=8", change(CASE, query_block=8))
    _refused("not query_block=2", change(CASE, H=32, query_block=2))
    _refused("not key_block=24", change(CASE, key_block=24))
    _refused("not J=4096", change(CASE, J=4096))
    slope_H = jnp.ones(CASE.H)
    _refused(
        "arrays that score_mod closes over",
        score_mod=lambda s, b, h, q_id, k_id: s * slope_H[h],
    )


def test_other_devices_are_refused_by_name():
    ampere = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0"
    )
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert mosaic_gpu.is_hopper(hopper) and not mosaic_gpu.is_hopper(ampere)
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        inputs = cases.make_inputs(CASE)
        with pytest.raises(NotImplementedError, match=jax.devices()[0].device_kind):
            mosaic_gpu.attend(
                *inputs[:3], inputs.selection, None, None, Options(scale=1.0)
            )
    assert dispatch.choose("gpu") != "mosaic_gpu"
