"""What `mosaic_tpu` promises beyond agreeing with the oracle; interpreted without a TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, mosaic_tpu, mosaic_tpu_dkv, tiles
from pallas_kernels.options import Options
from tests.pallas_kernels import cases, tolerance

CASE = cases.Case("mosaic_tpu", T=53, S=53, H=4, G=2, dtype="bfloat16")


def _differentiate(case, implementation):
    """out, lse and the gradients of q, k, v for random cotangents."""
    inputs = cases.make_inputs(case)

    def run(arrays, cotangents):
        def attend(*arrays):
            return cases.attend(
                case, cases.Inputs(*arrays, *inputs[3:]), implementation
            )

        results, pull = jax.vjp(attend, *arrays)
        return *results, *pull(cotangents)

    return jax.jit(run)(inputs[:3], cases.make_cotangents(case))


@pytest.mark.parametrize(
    ("case", "cores"),
    [
        # Long lists: rings go round, and pieces of a key block's readers follow each other.
        (cases.Case("long_lists", T=80, S=300, J=18, causal=False, token_mask=True), 1),
        (cases.Case("many_parts", T=70, S=70, H=10, query_block=64, segments=2), 1),
        (cases.Case("two_cores", B=2, bias=True, empty=0.3, query_block=32), 2),
    ],
    ids=str,
)
def test_no_races_and_no_reads_of_what_never_came(monkeypatch, case, cores):
    monkeypatch.setattr(mosaic_tpu_dkv, "PIECE", 8)
    sizes = dataclasses.replace(tiles.INTERPRETED_TPU, cores=cores)
    monkeypatch.setattr(tiles, "INTERPRETED_TPU", sizes)
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )
    attend = functools.partial(mosaic_tpu.attend, interpret=interpret)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_tpu", attend)
    actual = _differentiate(case, "mosaic_tpu")
    how = {"dtype": case.dtype, "length": case.longest_sum}
    for x, y in zip(actual, _differentiate(case, "reference")):
        tolerance.assert_close(x, y, name="result or gradient", **how)


def _refused(match, case=CASE, interpret=True, **options):
    """Asserts that a call raises NotImplementedError that says what to use instead."""
    inputs = cases.make_inputs(case)
    rules = Options(scale=1.0, **options)
    with pytest.raises(NotImplementedError, match=match) as refusal:
        mosaic_tpu.attend(
            *inputs[:3], inputs.selection, None, None, rules, interpret=interpret
        )
    assert "implementation='xla'" in str(refusal.value)


def test_calls_that_the_kernels_lack_are_refused():
    change = dataclasses.replace
    _refused("not K=320", change(CASE, K=320))
    _refused("not query_block=256", change(CASE, query_block=256))
    _refused("not key_block=24", change(CASE, key_block=24))
    _refused("not J=8192", change(CASE, J=8192))
    slope_H = jnp.ones(CASE.H)
    _refused(
        "arrays that score_mod closes over",
        score_mod=lambda s, b, h, q_id, k_id: s * slope_H[h],
    )


def test_other_devices_are_refused_by_name():
    if jax.default_backend() != "tpu":
        _refused(jax.devices()[0].device_kind, interpret=False)
    assert dispatch.choose("tpu") != "mosaic_tpu"
