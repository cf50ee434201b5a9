"""How far an implementation may stand from the oracle: the only place that says so."""

import jax.numpy as jnp
import numpy as np

ROUNDINGS = 4
"""Roundings to the input dtype between inputs and a result: the softmax weights, the
output or its cotangent, the logit's cotangent, and the stored gradient. Each is wrong by
half an epsilon at most."""


def assert_close(actual, expected, *, dtype, length, name):
    """Asserts that arrays agree to rounding, relative to the largest expected magnitude.

    Args:
        dtype: of the matmul operands; `ROUNDINGS` of them are allowed.
        length: longest sum behind an element. Float32 errors grow with its square root.
        name: of the array, for the message.
    """
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=name)
    assert np.isfinite(actual[finite]).all(), f"{name} has NaN or inf"
    unit = ROUNDINGS * float(jnp.finfo(dtype).eps) / 2
    unit += np.sqrt(length) * float(jnp.finfo(jnp.float32).eps)
    magnitude = np.abs(expected[finite]).max(initial=0.0)
    error = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    assert error <= unit * magnitude, (
        f"{name}: error {error:.3g}, allowed {unit * magnitude:.3g}"
    )
