"""What `triton` promises beyond agreeing with the oracle; interpreted or compiled where there is Triton."""

import dataclasses
import importlib.util
import multiprocessing
import types
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tiles, triton_gpu
from pallas_kernels.options import Options
from tests.pallas_kernels import cases, compile_triton, interpret_triton, tolerance

CASE = cases.Case("triton", T=53, S=53, H=4, G=2, token_mask=True, empty=0.2)
needs_triton = pytest.mark.skipif(
    not (interpret_triton.is_on_card() or interpret_triton.is_needed()),
    reason="needs Triton",
)
SHARED_KB = {80: 163, 89: 99, 90: 227}
"""Most shared memory of a thread block, by compute capability (CUDA programming guide)."""


def _device(platform, capability):
    return types.SimpleNamespace(
        platform=platform, device_kind="a card", compute_capability=capability
    )


def test_auto_is_triton_on_ampere_and_ada_where_it_is_installed(monkeypatch):
    for installed in (True, False):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, found=installed: found or None
        )
        for capability, best in (("7.5", False), ("8.0", True), ("8.9", True)):
            device = _device("gpu", capability)
            assert triton_gpu.is_best_for(device) == (best and installed)
        assert not triton_gpu.is_best_for(_device("gpu", "9.0"))
        assert not triton_gpu.is_best_for(_device("gpu", "gfx942"))
        assert not triton_gpu.is_best_for(_device("cpu", None))


def test_machines_that_lack_something_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="jax-triton, which is not installed"):
        triton_gpu.check_machine(_device("gpu", "8.0"))
    with pytest.raises(NotImplementedError, match="8.0 or more, not a card"):
        triton_gpu.check_machine(_device("gpu", "7.5"))


def test_calls_that_the_kernels_lack_are_refused():
    def refused(match, case=CASE, **options):
        inputs = cases.make_inputs(case)
        with pytest.raises(NotImplementedError, match=match) as refusal:
            triton_gpu.attend(
                *(*inputs[:3], inputs.selection, None, None),
                Options(scale=1.0, **options),
                capability=80,
            )
        assert "implementation='xla'" in str(refusal.value)
        assert "\n" not in str(refusal.value)

    change = dataclasses.replace
    refused("not K=320", change(CASE, K=320))
    refused("not 24", change(CASE, key_block=24))
    refused("can't trace a score_mod", score_mod=lambda s, b, h, q_id, k_id: s)
    refused("can't trace a mask_mod", mask_mod=lambda b, h, q_id, k_id: q_id > k_id)


def test_auto_leaves_to_xla_what_triton_cannot_compute(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda platform: "triton")
    monkeypatch.setattr(triton_gpu, "check_machine", lambda device: None)
    ran = []
    for name in ("triton", "xla"):

        def attend(q_BTHK, *_, name=name):
            ran.append(name)
            return q_BTHK, q_BTHK[..., 0].swapaxes(1, 2)

        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, attend)
    for case in (CASE, dataclasses.replace(CASE, score_mod="softcap")):
        cases.attend(case, cases.make_inputs(case), "auto")
    assert ran == ["triton", "xla"]


@needs_triton
def test_future_keys_change_no_bit_of_the_past():
    inputs, cut = cases.make_inputs(CASE), 29
    future_S = (jnp.arange(CASE.S) > cut)[:, None, None]
    attend = jax.jit(lambda inputs: cases.attend(CASE, inputs, "triton"))
    before = attend(inputs)
    after = attend(
        inputs._replace(
            k_BSGK=jnp.where(future_S, 7 - inputs.k_BSGK, inputs.k_BSGK),
            v_BSGK=jnp.where(future_S, 1000, inputs.v_BSGK),
        )
    )
    np.testing.assert_array_equal(before[0][:, : cut + 1], after[0][:, : cut + 1])
    np.testing.assert_array_equal(before[1][..., : cut + 1], after[1][..., : cut + 1])
    assert (before[0][:, cut + 1 :] != after[0][:, cut + 1 :]).any()


@needs_triton
def test_pieces_of_a_row_add_up(monkeypatch):
    """Key blocks that all query blocks read, in pieces of two readers of two tiles each."""
    sizes = tiles.TritonTiles(rows=16, keys=16, warps=4, stages=1, piece_steps=4)
    monkeypatch.setattr(tiles, "triton_dkv", lambda *_: sizes)
    case = cases.Case("sink", T=90, S=40, J=3, causal=False)
    inputs, cotangents = cases.make_inputs(case), cases.make_cotangents(case)
    lists = inputs.selection.block_id_BGQJ.shape
    selection = dataclasses.replace(
        inputs.selection,
        block_id_BGQJ=jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), lists),
        count_BGQ=jnp.full(lists[:-1], 3, jnp.int32),
    )

    def differentiate(implementation):
        def attend(*arrays):
            call = inputs._replace(
                k_BSGK=arrays[0], v_BSGK=arrays[1], selection=selection
            )
            return cases.attend(case, call, implementation)

        _, pull = jax.vjp(attend, inputs.k_BSGK, inputs.v_BSGK)
        return pull(cotangents)

    pairs = zip(differentiate("triton"), differentiate("reference"))
    for name, (actual, expected) in zip(("dk", "dv"), pairs):
        tolerance.assert_close(actual, expected, dtype="float32", length=180, name=name)


BIG = {"T": 256, "S": 256, "H": 16, "G": 2}
COMPILED = (
    cases.Case("blocks_of_128", **BIG, K=128, query_block=128, key_block=128),
    cases.Case("tokens_choose", **BIG, K=128, token_mask=True, bias=True, segments=2),
    cases.Case("width_256", **BIG, K=256, query_block=64, key_block=128, bias=True),
)


@pytest.mark.parametrize("capability", SHARED_KB)
def test_compiles(monkeypatch, tmp_path, capability):
    """For cards that aren't there: PTX is made, and shared memory suffices."""
    pytest.importorskip("triton")
    pytest.importorskip("jax_cuda13_plugin")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    shared, spawn = {}, multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        for case in COMPILED:
            case = dataclasses.replace(case, dtype="bfloat16")
            run = process.submit(compile_triton.compile_for, capability, case, tmp_path)
            shared |= {(case.name, kernel): x for kernel, x in run.result().items()}
    kernels = {kernel for _, kernel in shared}
    assert kernels == {"attend", "attend_dq", "attend_dkv", "add_pieces"}
    assert max(shared.values()) <= SHARED_KB[capability] * 1024, shared
