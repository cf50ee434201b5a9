"""Every implementation agrees with the oracle on every case, in values and gradients."""

import dataclasses
import functools

import jax
import pytest

from pallas_kernels import IMPLEMENTATIONS, mosaic_gpu, mosaic_gpu_operands, xla
from tests.pallas_kernels import cases, interpret_triton, tolerance

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
INTERPRETED = {
    *("width_256_bfloat16", "gqa_3", "key_block_128", "blocks_128_128", "softcap"),
    *("long_lists", "bias_that_hides", "everything_bfloat16", "everything_block_32"),
    *("query_block_4", "everything_block_8", "lengths"),
}
"""Cases whose backward pass by `mosaic_gpu` is interpreted."""
INTERPRETED_BY_TRITON = {
    *("width_80", "gqa_3", "key_block_128", "bias_that_hides", "token_mask_block_32"),
    *("segments", "lengths", "decode_3_tokens", "everything_block_32"),
}
"""Cases on which `triton` is interpreted, where there is Triton but no card."""
DIFFERENTIATED = sorted(set(IMPLEMENTATIONS) - {"reference", "mosaic_gpu", "triton"})
QUICKLY_COMPILED = None
if jax.default_backend() == "cpu":
    QUICKLY_COMPILED = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
"""Of an interpreted kernel, little runs in what XLA compiles: its compile time is what counts."""


@pytest.fixture(autouse=True)
def several_steps(monkeypatch):
    """Makes `xla` scan over several groups, which these small cases would not fill."""
    monkeypatch.setitem(xla.STEP_BYTES, jax.default_backend(), 16 * 2**10)


@functools.cache
def _run(case, implementation):
    """out, lse and the gradients of q, k, v and bias for random cotangents."""
    inputs = cases.make_inputs(case)

    def run(differentiated, cotangents):
        def attend(*arrays):
            return cases.attend(
                case, inputs._replace(**dict(zip(fields, arrays))), implementation
            )

        results, pull = jax.vjp(attend, *differentiated)
        return *results, *pull(cotangents)

    fields = inputs._fields[:4]
    options = QUICKLY_COMPILED if implementation == "mosaic_tpu" else None
    run = jax.jit(run, compiler_options=options)
    return run(inputs[:4], cases.make_cotangents(case))


@functools.cache
def _run_forward(case, implementation):
    """out and lse."""
    inputs = cases.make_inputs(case)
    return jax.jit(lambda inputs: cases.attend(case, inputs, implementation))(inputs)


def _assert_agree(case, actual, expected):
    for index, name in enumerate(NAMES[: len(actual)]):
        if expected[index] is None:
            continue
        tolerance.assert_close(
            actual[index],
            expected[index],
            dtype="float32" if name == "lse" else case.dtype,
            length=case.longest_sum,
            name=name,
        )


@pytest.mark.parametrize("implementation", DIFFERENTIATED)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_agrees_with_the_oracle(case, implementation):
    _assert_agree(case, _run(case, implementation), _run(case, "reference"))


def _unless_refused(case):
    """The case for `mosaic_gpu`, skipped if it is refused there."""
    if case.query_block in mosaic_gpu_operands.list_query_blocks(case.H // case.G):
        return case
    skip = pytest.mark.skip(reason="mosaic_gpu has no query blocks of so few rows")
    return pytest.param(case, marks=skip, id=f"{case}-refused:short-query-blocks")


@pytest.mark.parametrize("case", [_unless_refused(x) for x in cases.CASES], ids=str)
def test_mosaic_gpu_agrees_with_the_oracle(case):
    """On a card with gradients; interpreted, which is slow, with those of a few cases."""
    on_card = mosaic_gpu.is_hopper(jax.devices()[0])
    run = _run if on_card or case.name in INTERPRETED else _run_forward
    case = cases.fit(case, "mosaic_gpu")
    _assert_agree(case, run(case, "mosaic_gpu"), run(case, "reference"))


@pytest.mark.skipif(
    not (interpret_triton.is_on_card() or interpret_triton.is_needed()),
    reason="needs Triton",
)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_triton_agrees_with_the_oracle(case):
    """Without the mods that it refuses."""
    name = case.name
    case = cases.fit(case, "triton")
    if interpret_triton.is_needed():
        if name not in INTERPRETED_BY_TRITON:
            pytest.skip("interpreted on a few cases")
        if case.dtype == "bfloat16":
            case = dataclasses.replace(case, dtype="float16")
    _assert_agree(case, _run(case, "triton"), _run(case, "reference"))


def test_cases_are_distinct():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names) >= 40
