"""The order in which the Hopper forward kernel reads lists and goes through tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, mosaic_gpu, tiles
from tests.pallas_kernels import cases


def _compile(case):
    return jax.jit(lambda inputs: cases.attend(case, inputs, "mosaic_gpu"))


def test_the_place_of_blocks_read_in_part_changes_no_bit():
    case = cases.Case("places", T=40, S=300, J=13, dtype="bfloat16", query_offset=200)
    inputs, attend = cases.make_inputs(case), _compile(case)
    whole_QJ = jnp.broadcast_to(jnp.arange(10), (3, 10))
    cut_QJ = 12 + jnp.arange(3)[:, None] + jnp.arange(3)

    def attend_lists(*lists_QJ):
        selection = inputs.selection
        block_id_QJ = jnp.concatenate(lists_QJ, axis=1)
        selection = dataclasses.replace(
            selection,
            block_id_BGQJ=jnp.broadcast_to(block_id_QJ, selection.block_id_BGQJ.shape),
            count_BGQ=jnp.full_like(selection.count_BGQ, case.J),
        )
        return attend(inputs._replace(selection=selection))

    for x, y in zip(attend_lists(whole_QJ, cut_QJ), attend_lists(cut_QJ, whole_QJ)):
        np.testing.assert_array_equal(x, y)


LAPS = {"T": 150, "S": 400, "J": 12, "empty": 0.2, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("laps_of_teams", G=1, segments=2, **LAPS),
        cases.Case("laps_in_turns", H=4, G=1, query_block=32, query_offset=250, **LAPS),
    ],
    ids=str,
)
def test_a_thread_block_goes_from_tile_to_tile(monkeypatch, case):
    """Without races, and to the same bits as thread blocks of one tile."""
    inputs = cases.make_inputs(case)
    expected = _compile(case)(inputs)
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        # Before 0.12 it sees no races.
        interpret = plgpu.InterpretGPUParams(
            detect_races=jax.__version_info__ >= (0, 12)
        )
        attend = functools.partial(mosaic_gpu.attend, interpret=interpret)
        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", attend)
    monkeypatch.setattr(tiles, "hopper_processors", lambda device: 1)
    for x, y in zip(_compile(case)(inputs), expected):
        np.testing.assert_array_equal(x, y)
