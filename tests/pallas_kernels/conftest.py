"""Float32 means float32 in these tests, and a kernel without its device is interpreted."""

import functools
import os

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    IMPLEMENTATIONS,
    mosaic_gpu,
    mosaic_tpu,
    triton_gpu,
    triton_gpu_plan,
)
from tests.pallas_kernels import interpret_triton

if interpret_triton.is_needed():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32 or bfloat16 passes inside a matmul, in the oracle and in what meets it."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def interpreted_kernels(monkeypatch):
    """Lets kernels run anywhere; on the device that they are for, they are compiled."""
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        interpreted = functools.partial(
            mosaic_gpu.attend, interpret=plgpu.InterpretGPUParams()
        )
        monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", interpreted)
    if jax.default_backend() != "tpu":

        def interpreted_unless_for_tpu(*arguments):
            interpret = False if pltpu.is_tpu_device() else pltpu.InterpretParams()
            return mosaic_tpu.attend(*arguments, interpret=interpret)

        monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_tpu", interpreted_unless_for_tpu)
    if interpret_triton.is_needed():
        monkeypatch.setattr(triton_gpu_plan, "call", interpret_triton.call)
        without_a_card = functools.partial(triton_gpu.attend, capability=80)
        monkeypatch.setitem(IMPLEMENTATIONS, "triton", without_a_card)
