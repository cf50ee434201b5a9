"""Kernels compile for an H100, without one: layouts, shared memory and registers fit."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    BlockSelection,
    SegmentIds,
    block_sparse_attention,
    dispatch,
    mosaic_gpu,
    mosaic_gpu_operands,
    mosaic_gpu_search,
)
from tests.pallas_kernels import cases, h100

BIG = {"T": 256, "S": 256, "H": 8, "G": 2, "dtype": "bfloat16"}
CASES = (
    cases.Case("blocks_of_128", K=128, query_block=128, key_block=128, **BIG),
    cases.Case("tokens_choose", K=128, token_mask=True, **BIG),
    cases.Case("two_parts", K=128, query_block=32, token_mask=True, **BIG),
    cases.Case("width_64", K=64, query_block=32, key_block=32, **BIG),
    cases.Case("width_256", K=256, query_block=64, key_block=128, **BIG),
    cases.Case("one_part_of_256", K=256, **BIG),
    cases.Case("bias_and_segments", K=128, bias=True, segments=2, **BIG),
    cases.Case("mods", K=128, score_mod="alibi", mask_mod="per_head", **BIG),
    cases.Case("softcap", K=128, score_mod="softcap", mask_mod="window", **BIG),
    cases.Case("score_of_batch", K=128, score_mod="batch_parity", **BIG),
)


@pytest.fixture(scope="module")
def mesh():
    return h100.mesh()


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    compiled = functools.partial(mosaic_gpu.attend, interpret=False)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", compiled)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles(mesh, case):
    inputs = cases.make_inputs(case)

    def attend(*inputs):
        return cases.attend(case, cases.Inputs(*inputs), "mosaic_gpu")

    text = h100.compile_for(mesh, attend, *inputs).as_text()
    assert "mosaic_gpu" in text


BACKWARD = (
    cases.Case("blocks_of_128", K=128, query_block=128, key_block=128, **BIG),
    cases.Case("width_256", K=256, query_block=64, key_block=128, **BIG),
    cases.Case(
        "four_tokens",
        **BIG | {"H": 64, "G": 4},
        K=128,
        query_block=4,
        key_block=64,
        token_mask=True,
    ),
    cases.Case(
        "tokens_choose",
        **BIG,
        K=128,
        token_mask=True,
        bias=True,
        segments=2,
        score_mod="softcap",
        mask_mod="per_head",
    ),
)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward_compiles(mesh, case):
    inputs = cases.make_inputs(case)
    cotangents = cases.make_cotangents(case)

    def differentiate(inputs, cotangents):
        def attend(*arrays):
            call = cases.Inputs(*arrays, *inputs[4:])
            return cases.attend(case, call, "mosaic_gpu")

        return jax.vjp(attend, *inputs[:4])[1](cotangents)

    text = h100.compile_for(mesh, differentiate, tuple(inputs), cotangents).as_text()
    kernels = "dq, dk and dv, and a sum for each of the last two, beside the forward"
    assert text.count('custom_call_target="mosaic_gpu') == 5, kernels


def _shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _compile(mesh, T, K, J, block, bias=False, query_block=None):
    """Compiles both passes of 16 query heads whose tokens choose for themselves.

    Args:
        bias: with a bias and segments.
        query_block: tokens; by default a block, and there are 4 groups. Else one.
    """
    H, G = (16, 1) if query_block else (16, 4)
    query_block = query_block or block
    lists = (1, G, T // query_block)
    selection = BlockSelection(
        _shape(jnp.int32, *lists, J),
        _shape(jnp.int32, *lists),
        _shape(jnp.uint32, *lists, J),
        query_block,
        block,
    )
    q_BTHK = _shape(jnp.bfloat16, 1, T, H, K)
    k_BSGK = _shape(jnp.bfloat16, 1, T, G, K)
    bias_BGTJ = _shape(jnp.float32, 1, G, T, J) if bias else None

    segment_BT = _shape(jnp.int32, 1, T)

    def differentiate(arrays, selection, segment_ids, d_out):
        def attend(q_BTHK, k_BSGK, v_BSGK, bias_BGTJ):
            return block_sparse_attention(
                q_BTHK,
                k_BSGK,
                v_BSGK,
                selection,
                scale=K**-0.5,
                bias_BGTJ=bias_BGTJ,
                segment_ids=segment_ids,
                implementation="mosaic_gpu",
            )[0]

        out_BTHK, pull = jax.vjp(attend, *arrays)
        return out_BTHK, pull(d_out)

    arrays = (q_BTHK, k_BSGK, k_BSGK, bias_BGTJ)
    segment_ids = SegmentIds(segment_BT, segment_BT) if bias else None
    return h100.compile_for(mesh, differentiate, arrays, selection, segment_ids, q_BTHK)


def test_a_layer_of_a_million_tokens_fits_on_a_card(mesh):
    memory = _compile(mesh, T=2**20, K=128, J=96, block=16).memory_analysis()
    # The sums of pieces take most; queries and what goes with them, 4 GiB each, count apart.
    assert memory.temp_size_in_bytes < 18 * 2**30
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes < 21 * 2**30


@pytest.mark.parametrize(("K", "block"), [(128, 16), (128, 32), (256, 16)])
def test_the_longest_lists_fit_in_shared_memory(mesh, K, block):
    """Forward and backward, with bias and segments."""
    _compile(mesh, T=2**14, K=K, J=mosaic_gpu_operands.MAX_LIST, block=block, bias=True)


def test_the_longest_lists_of_a_few_tokens_fit_in_shared_memory(mesh):
    J = mosaic_gpu_operands.MAX_SHORT_LIST
    _compile(mesh, T=2**13, K=128, J=J, block=16, bias=True, query_block=8)


@pytest.mark.parametrize(("R", "group"), [(8, None), (4, 32), (2, 32)])
def test_searches_fit_in_shared_memory(mesh, R, group):
    """Of chapters, and of the members of sixteen of them, with spreads."""
    M, T, looked = 2**16, 2**14, 18
    shapes = [(1, T, 4, 128), (1, 4, M, R, 128), (1, 4, M, R), (1, 4, M, R)]
    floats = [_shape(jnp.bfloat16, *shape) for shape in shapes[:2]]
    floats += [_shape(jnp.float32, *shape) for shape in (*shapes[2:], (1, T, 4))]
    place_BT, group_BGTX = (
        _shape(jnp.int32, *shape) for shape in ((1, T), (1, 4, T, looked))
    )

    def search(q, point, log_count, spread, square, low, high, groups):
        return mosaic_gpu_search.find(
            *(q, point, log_count, low, high),
            16,
            groups=(groups, group) if group else None,
            widths=(square, spread),
            interpret=False,
        )

    text = h100.compile_for(
        mesh, search, *floats, place_BT, place_BT, group_BGTX
    ).as_text()
    assert "mosaic_gpu" in text
