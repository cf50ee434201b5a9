"""Runs the Triton kernels on any device, slowly, by Triton's own interpreter.

For that TRITON_INTERPRET=1 must be set before Triton is imported. It wants tensors of torch and gets arrays of NumPy that answer what it asks. It can't multiply
bfloat16 (Triton 3.6 to 3.8), and fails with NumPy 2.5 before Triton 3.8.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import triton_gpu

NAMES = {"float32": "fp32", "float16": "fp16", "int32": "i32", "uint32": "u32"}


def is_on_card():
    """Whether the kernels run as users run them."""
    try:
        triton_gpu.check_machine(jax.devices()[0])
    except NotImplementedError:
        return False
    return True


def is_needed():
    """Whether there is Triton, but no card."""
    return importlib.util.find_spec("triton") is not None and not is_on_card()


def call(kernel, plan, arrays, out_type, grid, capability):
    """Stands in for `triton_gpu_plan.call`. What a kernel doesn't write is NaN."""
    del capability

    def run(*present):
        rest = iter(present)
        nothing = np.zeros(1, np.int32)
        inputs = [nothing if x is None else np.array(next(rest)) for x in arrays]
        outputs = [np.full(x.shape, np.nan, x.dtype) for x in out_type]
        kernel[grid](*map(_Tensor, [*inputs, *outputs]), plan)
        return outputs

    return jax.pure_callback(run, out_type, *[x for x in arrays if x is not None])


class _Tensor:
    """An array, as far as the interpreter needs a tensor; its own storage, on the host."""

    def __init__(self, array):
        self.array = array
        self.dtype = NAMES[jnp.dtype(array.dtype).name]

    def data_ptr(self):
        return self.array.ctypes.data

    def _get_self(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = _get_self
    storage_offset = size = stride = _get_self
