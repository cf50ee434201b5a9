"""Cases on which every implementation must agree with the oracle, and their inputs.

A case is a size, a dtype and a choice of options; `make_inputs` draws the arrays from a
seed that depends on its name alone.
"""

import dataclasses
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockSelection, SegmentIds, block_sparse_attention

WINDOW = 24
SOFTCAP = 2.0


def _slopes(h):
    return jnp.exp2(-1.0 - h.astype(jnp.float32))


SCORE_MODS = {
    "alibi": lambda s, b, h, q_id, k_id: s - _slopes(h) * jnp.abs(q_id - k_id),
    "softcap": lambda s, b, h, q_id, k_id: SOFTCAP * jnp.tanh(s / SOFTCAP),
    "batch_parity": lambda s, b, h, q_id, k_id: jnp.where((b + k_id) % 2, s, 0.5 * s),
}
MASK_MODS = {
    "window": lambda b, h, q_id, k_id: q_id - k_id < WINDOW,
    "per_head": lambda b, h, q_id, k_id: (k_id + h + b) % 3 > 0,
    "nothing": lambda b, h, q_id, k_id: k_id < -1,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, dtype and options of one call; letters as in `pallas_kernels.shapes`.

    Attributes:
        segments: documents in the row; 0 for no segment ids.
        hidden: probability that a token's bias on a block is -inf.
        empty: probability that a query block's list is empty.
        offset_step: query_offset of a sequence beyond that of the one before; 0 makes it
            the same int for all.
    """

    name: str
    B: int = 1
    T: int = 64
    S: int = 64
    H: int = 2
    G: int = 1
    K: int = 16
    J: int = 3
    query_block: int = 16
    key_block: int = 16
    dtype: str = "float32"
    token_mask: bool = False
    bias: bool = False
    hidden: float = 0.0
    score_mod: str | None = None
    mask_mod: str | None = None
    segments: int = 0
    causal: bool = True
    query_offset: int = 0
    offset_step: int = 0
    key_offset: int = 0
    empty: float = 0.0

    def __str__(self):
        return self.name

    @property
    def longest_sum(self):
        """Terms of the longest sum: over a list's keys, a head's width or a key's queries."""
        return max(self.J * self.key_block, self.K, self.T * self.H // self.G)


_EVERYTHING = {
    "B": 2,
    "T": 53,
    "S": 77,
    "H": 4,
    "G": 2,
    "token_mask": True,
    "bias": True,
    "score_mod": "alibi",
    "mask_mod": "per_head",
    "segments": 3,
    "query_offset": 30,
    "key_offset": 6,
    "empty": 0.2,
}

_DECODE = {"query_offset": 7, "offset_step": 61, "dtype": "bfloat16"}

CASES = (
    Case("plain"),
    Case("batch_3", B=3),
    Case("one_token", T=1, S=1, J=1),
    Case("one_key_block", S=16, J=1),
    Case("list_of_every_block", J=4, causal=False),
    Case("mha", H=3, G=3),
    Case("gqa_1_of_2", H=2, G=2, B=2),
    Case("gqa_3", H=6, G=2),
    Case("gqa_4", H=4, G=1),
    Case("gqa_8", H=16, G=2, T=32),
    Case("gqa_16", H=16, G=1, T=32),
    Case("width_64", K=64),
    Case("width_80", K=80),
    Case("width_128", K=128),
    Case("width_256", K=256),
    Case("width_64_bfloat16", K=64, dtype="bfloat16"),
    Case("width_80_bfloat16", K=80, dtype="bfloat16"),
    Case("width_128_bfloat16", K=128, dtype="bfloat16"),
    Case("width_256_bfloat16", K=256, dtype="bfloat16"),
    Case("width_64_float16", K=64, dtype="float16"),
    Case("ragged_queries", T=57),
    Case("ragged_keys", S=57),
    Case("ragged_both", T=35, S=51, causal=False),
    Case("shorter_than_a_block", T=5, S=7, J=1),
    Case("query_block_32", query_block=32),
    Case("query_block_64", query_block=64, T=100),
    Case("query_block_128", query_block=128, T=150),
    Case("key_block_32", key_block=32, S=100),
    Case("key_block_64", key_block=64, S=200),
    Case("key_block_128", key_block=128, S=300, J=2),
    Case("blocks_32_64", query_block=32, key_block=64, S=130, token_mask=True),
    Case("blocks_64_32_bfloat16", query_block=64, key_block=32, dtype="bfloat16"),
    Case(
        "blocks_128_128", query_block=128, key_block=128, T=140, S=260, J=2, bias=True
    ),
    Case("long_lists", T=48, S=700, J=40, causal=False),
    Case("long_lists_of_many_rows", H=4, query_block=32, S=700, J=40, query_offset=600),
    Case("empty_lists", B=2, empty=0.5),
    Case("all_lists_empty", empty=1.0),
    Case("every_row_before_its_keys", key_offset=100),
    Case("no_key_allowed", mask_mod="nothing"),
    Case("token_mask", token_mask=True),
    Case("token_mask_block_32", token_mask=True, query_block=32),
    Case("bias", bias=True),
    Case("bias_bfloat16", bias=True, dtype="bfloat16", H=4, G=2, B=2),
    Case("bias_that_hides", bias=True, hidden=0.6),
    Case("softcap", score_mod="softcap"),
    Case("alibi", score_mod="alibi", H=4, G=2),
    Case("score_of_batch", score_mod="batch_parity", B=2),
    Case("window", mask_mod="window"),
    Case("mask_per_head", mask_mod="per_head", H=4, G=2, B=2),
    Case("segments", segments=3, B=2),
    Case("segments_not_causal", segments=2, causal=False, T=40, S=70),
    Case("not_causal", causal=False),
    Case("query_offset", T=16, S=96, query_offset=80),
    Case("key_offset", S=48, T=64, key_offset=16),
    Case("both_offsets", T=20, S=90, query_offset=1000, key_offset=930),
    Case("lengths", B=3, T=40, S=90, query_offset=10, offset_step=20),
    Case("decode", B=3, T=1, S=200, H=8, G=2, K=64, J=6, query_block=1, **_DECODE),
    Case("decode_3_tokens", B=2, T=3, S=100, H=3, G=3, query_block=3, **_DECODE),
    Case("everything", **_EVERYTHING),
    Case("everything_bfloat16", dtype="bfloat16", **_EVERYTHING),
    Case("everything_block_32", query_block=32, key_block=32, K=64, **_EVERYTHING),
    Case("query_block_1", T=3, H=64, query_block=1, query_offset=50),
    Case("query_block_4", H=16, T=21, query_block=4, token_mask=True, empty=0.2),
    Case(
        "everything_block_8",
        **_EVERYTHING | {"B": 1, "T": 21, "S": 200, "H": 32},
        query_block=8,
        key_block=64,
    ),
)


def fit(case: Case, implementation: str) -> Case:
    """The case in a dtype that the implementation multiplies, without what it refuses."""
    if implementation == "mosaic_gpu" and case.dtype == "float32":
        return dataclasses.replace(case, dtype="bfloat16")
    if implementation == "triton":
        return dataclasses.replace(case, score_mod=None, mask_mod=None)
    return case


class Inputs(NamedTuple):
    """Arrays of a case; the first four are differentiated."""

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    bias_BGTJ: jax.Array | None
    selection: BlockSelection
    segment_ids: SegmentIds | None


def make_inputs(case: Case) -> Inputs:
    """Draws the arrays of a case: the same ones every time, on every device."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    c = case
    segment_ids = None
    if c.segments:
        segment_ids = SegmentIds(
            *(_draw_segments(rng, c.B, length, c.segments) for length in (c.T, c.S))
        )
    return Inputs(
        _draw(rng, c.dtype, c.B, c.T, c.H, c.K),
        _draw(rng, c.dtype, c.B, c.S, c.G, c.K),
        _draw(rng, c.dtype, c.B, c.S, c.G, c.K),
        _draw_bias(rng, c) if c.bias else None,
        _draw_selection(rng, c),
        segment_ids,
    )


def make_cotangents(case: Case):
    """Draws cotangents of out and lse; empty rows get one too, which must not matter."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()) + 1)
    out_BTHK = _draw(rng, case.dtype, case.B, case.T, case.H, case.K)
    return out_BTHK, _draw(rng, "float32", case.B, case.H, case.T)


def attend(case: Case, inputs: Inputs, implementation: str):
    """Calls `block_sparse_attention` as the case says."""
    return block_sparse_attention(
        inputs.q_BTHK,
        inputs.k_BSGK,
        inputs.v_BSGK,
        inputs.selection,
        scale=case.K**-0.5,
        bias_BGTJ=inputs.bias_BGTJ,
        segment_ids=inputs.segment_ids,
        score_mod=SCORE_MODS.get(case.score_mod),
        mask_mod=MASK_MODS.get(case.mask_mod),
        causal=case.causal,
        query_offset=case.query_offset + case.offset_step * jnp.arange(case.B)
        if case.offset_step
        else case.query_offset,
        key_offset=case.key_offset,
        implementation=implementation,
    )


def _draw(rng, dtype, *shape):
    return jnp.asarray(rng.normal(size=shape), dtype)


def _draw_bias(rng, case):
    bias_BGTJ = _draw(rng, "float32", case.B, case.G, case.T, case.J)
    return jnp.where(rng.random(bias_BGTJ.shape) < case.hidden, -jnp.inf, bias_BGTJ)


def _draw_segments(rng, B, length, segments):
    return jnp.asarray(np.sort(rng.integers(0, segments, (B, length))), jnp.int32)


def _draw_selection(rng, case):
    """Random ascending lists, of blocks in the future too: masks must deal with them."""
    Q, N = -(-case.T // case.query_block), -(-case.S // case.key_block)
    shape = (case.B, case.G, Q)
    count = rng.integers(1, min(case.J, N) + 1, shape)
    count = np.where(rng.random(shape) < case.empty, 0, count).astype(np.int32)
    block_id = np.full((*shape, case.J), -1, np.int32)
    for place in np.ndindex(shape):
        n = count[place]
        block_id[place][:n] = np.sort(rng.permutation(N)[:n])
    token_mask = rng.integers(
        0, 2 ** min(case.query_block, 32), block_id.shape, dtype=np.uint32
    )
    return BlockSelection(
        jnp.asarray(block_id),
        jnp.asarray(count),
        jnp.asarray(token_mask) if case.token_mask else None,
        case.query_block,
        case.key_block,
    )
