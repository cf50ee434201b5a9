"""Every implementation agrees with the oracle on every case, in values and gradients."""

import functools

import jax
import pytest

from pallas_kernels import IMPLEMENTATIONS, xla
from tests.pallas_kernels import cases, tolerance

NAMES = {"out": 0, "lse": 1, "dq": 2, "dk": 3, "dv": 4, "dbias": 5}


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
    return jax.jit(run)(inputs[:4], cases.make_cotangents(case))


@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - {"reference"}))
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_agrees_with_the_oracle(case, implementation):
    actual, expected = _run(case, implementation), _run(case, "reference")
    for name, index in NAMES.items():
        if expected[index] is None:
            continue
        tolerance.assert_close(
            actual[index],
            expected[index],
            dtype="float32" if name == "lse" else case.dtype,
            length=case.longest_sum,
            name=name,
        )


def test_cases_are_distinct():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names) >= 40
