"""Kernels compile for TPUs, without one: layouts, VMEM and SMEM fit, memory is linear."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockSelection, block_sparse_attention, tiles
from tests.pallas_kernels import cases, tpu

GENERATIONS = sorted(tpu.TOPOLOGIES)
VMEM_LIMIT = 16 * 2**20
"""What Mosaic gives a kernel that asks for no more, bytes."""
TOKENS = (2**15, 2**20, 10 * 2**20)
CHIPS = 16
"""Chips that share a sequence: each compiles for its slice of queries, keys and lists."""
KERNELS = {
    "forward": {"bsa_forward"},
    "backward": {"bsa_forward", "bsa_dq", "bsa_dkv"},
    "decode": {"bsa_forward"},
}


def _shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _compile_slice(mesh, kernel, tokens):
    """Compiles one chip's slice of a layer: 8 query heads in 2 groups of width 128."""
    S, H, G, K, C = tokens // CHIPS, 8, 2, 128, 128
    # Decoding: 8 sequences of different lengths, one token each, fine blocks.
    B, T, block, J = (1, S, C, 16) if kernel != "decode" else (8, 1, 1, 128)
    C = C if kernel != "decode" else 16
    lists = (B, G, -(-T // block))
    q_BTHK = _shape(jnp.bfloat16, B, T, H, K)
    # A cache is kept as [B, G, S, K]: the kernel reads it as it is.
    k_BGSK = _shape(jnp.bfloat16, B, G, S, K)
    arrays = (q_BTHK, k_BGSK, k_BGSK)
    block_id, count = _shape(jnp.int32, *lists, J), _shape(jnp.int32, *lists)

    def attend(arrays, block_id, count, query_offset):
        q_BTHK, k_BGSK, v_BGSK = arrays
        return block_sparse_attention(
            q_BTHK,
            k_BGSK.swapaxes(1, 2),
            v_BGSK.swapaxes(1, 2),
            BlockSelection(block_id, count, None, block, C),
            scale=K**-0.5,
            query_offset=query_offset,
            implementation="mosaic_tpu",
        )[0]

    def differentiate(arrays, *others):
        out, pull = jax.vjp(lambda arrays: attend(arrays, *others), arrays)
        return pull(out)

    function = differentiate if kernel == "backward" else attend
    offset = _shape(jnp.int32, B)
    return tpu.compile_for(mesh, function, arrays, block_id, count, offset)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_with_memory_linear_in_tokens(generation, kernel):
    mesh, peaks = tpu.mesh(generation), []
    for tokens in TOKENS:
        compiled = _compile_slice(mesh, kernel, tokens)
        found = tpu.kernels(compiled)
        assert set(found) == KERNELS[kernel]
        assert 0 < max(found.values()) < VMEM_LIMIT
        memory = compiled.memory_analysis()
        peaks.append(memory.peak_memory_in_bytes)
        if kernel == "decode":
            assert memory.temp_size_in_bytes < 2**20, "the cache is copied"
    for tokens, peak in zip(TOKENS, peaks):
        ratio = (peak / peaks[0]) / (tokens / TOKENS[0])
        print(f"{generation} {kernel}: {tokens} tokens on {CHIPS} chips, {peak} bytes")
        print(f"  of a chip, {ratio:.3f} of what the shortest says")
        assert ratio < 1.1


SMALL = {"T": 96, "S": 250, "J": 9}
EVERYTHING = {
    "token_mask": True,
    "bias": True,
    "segments": 2,
    "score_mod": "alibi",
    "mask_mod": "per_head",
}
CASES = (
    cases.Case("everything", H=4, G=2, K=128, dtype="bfloat16", **SMALL, **EVERYTHING),
    cases.Case("float32_of_256", H=4, K=256, query_block=32, **SMALL, **EVERYTHING),
    cases.Case("many_parts", H=32, K=64, query_block=64, key_block=64, **SMALL),
    cases.Case("few_rows", T=3, S=250, J=9, H=3, G=3, query_block=3, dtype="bfloat16"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option_compiles(case):
    inputs = cases.make_inputs(case)

    def run(inputs, cotangents):
        def attend(*arrays):
            return cases.attend(case, cases.Inputs(*arrays, *inputs[4:]), "mosaic_tpu")

        return jax.vjp(attend, *inputs[:4])[1](cotangents)

    arrays = (inputs, cases.make_cotangents(case))
    compiled = tpu.compile_for(tpu.mesh("v5e"), run, *arrays)
    assert len(tpu.kernels(compiled)) == 3


def test_too_much_vmem_is_an_error_of_the_compiler(monkeypatch):
    huge = dataclasses.replace(tiles.INTERPRETED_TPU, ring_bytes=2**28, max_slots=2**8)
    monkeypatch.setattr(tiles, "tpu", lambda info: huge)
    with pytest.raises(Exception, match="vmem"):
        _compile_slice(tpu.mesh("v5e"), "forward", TOKENS[0])
