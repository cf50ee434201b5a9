"""Float32 means float32 in these tests: no TF32 or bfloat16 passes inside a matmul."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision():
    """Applies to the oracle and to what is compared with it alike."""
    with jax.default_matmul_precision("highest"):
        yield
