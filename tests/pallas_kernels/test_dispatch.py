"""A call that cannot be right is refused in one clear line, and "auto" chooses once."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import SegmentIds, block_sparse_attention, dispatch
from tests.pallas_kernels import cases

CASE = cases.Case("dispatch", B=2, T=32, S=48, H=4, G=2, bias=True, segments=2)


def _refused(match, selection=None, **changes):
    """Asserts that a call with these changes raises ValueError with this message."""
    inputs = cases.make_inputs(CASE)
    if selection:
        selection = dataclasses.replace(inputs.selection, **selection)
    arguments = {
        "q_BTHK": inputs.q_BTHK,
        "k_BSGK": inputs.k_BSGK,
        "v_BSGK": inputs.v_BSGK,
        "selection": selection or inputs.selection,
        "bias_BGTJ": inputs.bias_BGTJ,
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=match) as refusal:
        block_sparse_attention(**(arguments | changes))
    assert "\n" not in str(refusal.value)


def test_unknown_implementation_is_refused_with_the_list():
    names = ", ".join(dispatch.IMPLEMENTATIONS)
    _refused(f"'cuda' is none of auto, {names}", implementation="cuda")


def test_arrays_that_disagree_are_refused():
    _refused("v_BSGK has S=47, but S=48", v_BSGK=jnp.zeros((2, 47, 2, 16)))
    _refused("v_BSGK has K=8, but K=16", v_BSGK=jnp.zeros((2, 48, 2, 8)))
    _refused("k_BSGK has shape", k_BSGK=jnp.zeros((2, 48, 16)))
    _refused("bias_BGTJ has J=5", bias_BGTJ=jnp.zeros((2, 2, 32, 5)))
    ids = SegmentIds(jnp.zeros((2, 32), jnp.int32), jnp.zeros((2, 32), jnp.int32))
    _refused("segment_key_BS has S=32", segment_ids=ids)


def test_wrong_dtypes_are_refused():
    _refused("share one float dtype", v_BSGK=jnp.zeros((2, 48, 2, 16), jnp.bfloat16))
    integers = {x: jnp.zeros((2, 48, 2, 16), jnp.int32) for x in ("k_BSGK", "v_BSGK")}
    _refused("share one", q_BTHK=jnp.zeros((2, 32, 4, 16), jnp.int32), **integers)
    _refused("bias is bfloat16", bias_BGTJ=jnp.zeros((2, 2, 32, 3), jnp.bfloat16))
    ids = SegmentIds(jnp.zeros((2, 32)), jnp.zeros((2, 48), jnp.int32))
    _refused("query segment ids are float32", segment_ids=ids)


def test_selection_is_checked():
    _refused("Q=2 lists for T=32 tokens in blocks of 8", selection={"query_block": 8})


def test_mods_must_make_one_scalar_of_scalars():
    _refused("score_mod makes", score_mod=lambda s, b, h, q_id, k_id: s > 0)
    _refused("score_mod makes", score_mod=lambda s, b, h, q_id, k_id: s[None])
    _refused("mask_mod makes", mask_mod=lambda b, h, q_id, k_id: q_id)


def test_auto_is_logged_once(caplog):
    dispatch.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        choices = {dispatch.resolve("auto") for _ in range(3)}
    assert choices <= set(dispatch.IMPLEMENTATIONS) and len(choices) == 1
    assert [jax.default_backend() in line for line in caplog.messages] == [True]


def test_auto_leaves_to_xla_what_the_hopper_kernels_cannot_compute(monkeypatch):
    """On a card, which is not needed to choose: only the calls that fit are the kernels'."""
    monkeypatch.setattr(dispatch, "choose", lambda platform: "mosaic_gpu")
    monkeypatch.setattr(dispatch.mosaic_gpu, "check_device", lambda device: None)
    ran = []
    for name in ("mosaic_gpu", "xla"):

        def attend(q_BTHK, *_, name=name):
            ran.append(name)
            return q_BTHK, q_BTHK[..., 0].swapaxes(1, 2).astype(jnp.float32)

        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, attend)
    for dtype, block in (("bfloat16", 16), ("float32", 16), ("bfloat16", 8)):
        case = dataclasses.replace(
            CASE, dtype=dtype, query_block=block, key_block=block
        )
        inputs = cases.make_inputs(case)
        block_sparse_attention(*inputs[:3], inputs.selection, scale=1.0)
    assert ran == ["mosaic_gpu", "xla", "xla"]
