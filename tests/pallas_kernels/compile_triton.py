"""Compiles the Triton kernels for a card that isn't there, in a process of its own.

Elsewhere Triton is imported for its interpreter, which it then is for good.
"""

import functools
import os
import pathlib
import re

import jax

from pallas_kernels import dispatch, triton_gpu
from tests.pallas_kernels import cases

CUDA_TARGETS = ("cuda",)


def compile_for(capability, case, folder):
    """Compiles both passes of a case.

    Args:
        folder: for what jax-triton says of each kernel; empty.
    Returns:
        Shared memory of each kernel, bytes, by its name.
    """
    os.environ["JAX_TRITON_DUMP_DIR"] = str(folder)  # Read when jax-triton is imported.
    attend = functools.partial(triton_gpu.attend, capability=capability)
    dispatch.IMPLEMENTATIONS["triton"] = attend
    inputs, cotangents = cases.make_inputs(case), cases.make_cotangents(case)

    def differentiate(differentiated, cotangents):
        def attend(*arrays):
            call = cases.Inputs(*arrays, *inputs[4:])
            return cases.attend(case, call, "triton")

        return jax.vjp(attend, *differentiated)[1](cotangents)

    traced = jax.jit(differentiate).trace(inputs[:4], cotangents)
    traced.lower(lowering_platforms=CUDA_TARGETS)
    shared = {}
    for file in pathlib.Path(folder).glob("*/*.compile_info"):
        name, size = re.match(
            r"(\w+): shared_mem_bytes: (\d+)", file.read_text()
        ).groups()
        shared[name] = int(size)
    return shared
