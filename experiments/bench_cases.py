"""Calls that `bench_kernels` times: heads, blocks and lists, drawn on the device from a seed."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import BlockSelection


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads and blocks of one call; `read_len` tokens are listed for a query block.

    Attributes:
        masked: with a token mask, in which each token chose half of its block's list.
    """

    name: str
    H: int = 16
    G: int = 4
    K: int = 128
    query_block: int = 128
    key_block: int = 128
    read_len: int = 2560
    masked: bool = False


CASES = (
    Case("128x128"),
    Case("128x128_32_heads", H=32, G=8),
    Case("128x16", key_block=16),
    Case("32x16", query_block=32, key_block=16),
    Case("32x16_masked", query_block=32, key_block=16, masked=True),
    Case("16x128", query_block=16),
    Case("16x16_masked", query_block=16, key_block=16, read_len=1296, masked=True),
)


def shapes(case, length):
    """Shapes of q, k, v and the cotangent of out."""
    return [(1, length, x, case.K) for x in (case.H, case.G, case.G, case.H)]


def make_arrays(case, length):
    """Random q, k, v and a cotangent of out, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes(case, length))
    ]


def make_selection(case, length):
    """Causal lists: the block of token 0, the newest blocks, and random ones between.

    A quarter of a list is local. The blocks between are drawn one from each of as many
    equal stretches as there is room for. An early query block lists all that is before it.
    """
    Q, J = length // case.query_block, case.read_len // case.key_block
    newest_Q1 = ((jnp.arange(Q) + 1) * case.query_block - 1)[:, None] // case.key_block
    num_local = J // 4
    num_drawn = J - 1 - num_local
    key, mask_key = jax.random.split(jax.random.key(1))
    between_Q1 = newest_Q1 - num_local
    edge = jnp.arange(num_drawn + 1) * between_Q1 // num_drawn
    size = jnp.maximum(1, edge[:, 1:] - edge[:, :-1])
    draw = jax.random.uniform(key, (case.G, Q, num_drawn))
    drawn = 1 + edge[:, :-1] + (draw * size).astype(jnp.int32)
    sink = jnp.zeros((case.G, Q, 1), jnp.int32)
    local = newest_Q1 - num_local + 1 + jnp.arange(num_local)
    chosen = jnp.concatenate(
        [sink, drawn, jnp.broadcast_to(local, (case.G, Q, num_local))], axis=-1
    )
    all_before = jnp.arange(J)
    all_before = jnp.where(all_before <= newest_Q1, all_before, -1)
    is_early_Q1 = newest_Q1 < J
    block_id = jnp.where(is_early_Q1, all_before, chosen).astype(jnp.int32)[None]
    mask = None
    if case.masked:
        mask = jax.random.bits(mask_key, block_id.shape, jnp.uint32)
        mask &= jnp.uint32(2**case.query_block - 1)
    return BlockSelection(
        block_id,
        (block_id >= 0).sum(-1).astype(jnp.int32),
        mask,
        case.query_block,
        case.key_block,
    )


def count_pairs(case, length, selection=None):
    """Pairs of queries and keys, of all query heads: listed, or below the diagonal."""
    pairs = case.G * length * (length + 1) / 2
    if selection is not None:
        listed = float(selection.count_BGQ.astype(jnp.float32).sum())
        pairs = listed * case.query_block * case.key_block
    return case.H // case.G * pairs
