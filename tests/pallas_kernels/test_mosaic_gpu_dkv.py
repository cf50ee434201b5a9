"""The pass for dK and dV on Hopper works in proportion to what is listed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, mosaic_gpu
from tests.pallas_kernels import cases

# Eight parts of queries go through six stages.
CASE = cases.Case("even_blocks", T=128, S=112, dtype="bfloat16", causal=False)


@jax.jit
def _differentiate(inputs, cotangents):
    def attend(k_BSGK, v_BSGK):
        call = inputs._replace(k_BSGK=k_BSGK, v_BSGK=v_BSGK)
        return cases.attend(CASE, call, "mosaic_gpu")

    return jax.vjp(attend, inputs.k_BSGK, inputs.v_BSGK)[1](cotangents)


def test_blocks_of_a_tile_that_nobody_lists_are_not_multiplied(monkeypatch):
    """Nor do the consumers race with each other, or with the producer."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    attend = functools.partial(mosaic_gpu.attend, interpret=interpret)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", attend)
    inputs, cotangents = cases.make_inputs(CASE), cases.make_cotangents(CASE)
    selection = inputs.selection
    even = dataclasses.replace(selection, block_id_BGQJ=selection.block_id_BGQJ % 4 * 2)
    inputs = inputs._replace(selection=even)
    is_odd_S = jnp.arange(CASE.S) // CASE.key_block % 2 == 1
    k_BSGK, v_BSGK = (
        jnp.where(is_odd_S[:, None, None], jnp.nan, x)
        for x in (inputs.k_BSGK, inputs.v_BSGK)
    )
    before = _differentiate(inputs, cotangents)
    after = _differentiate(inputs._replace(k_BSGK=k_BSGK, v_BSGK=v_BSGK), cotangents)
    for x, y in zip(before, after):
        np.testing.assert_array_equal(x, y)
        assert (y[:, is_odd_S] == 0).all() and (y != 0).any()
