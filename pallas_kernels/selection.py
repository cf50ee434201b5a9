"""`BlockSelection`: which key blocks each query block reads. The only contract between an index and a kernel."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import shapes

MAX_MASKED_TOKENS = 32
"""Longest query block that a uint32 token mask can describe."""


class SegmentIds(NamedTuple):
    """Documents of a packed row: a query reads a key only if their ids are equal. int32, any values."""

    query_BT: jax.Array
    key_BS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSelection:
    """Key blocks read by each block of queries; one list per key/value head, shared by its H/G query heads.

    Query block i holds tokens [i * query_block, (i + 1) * query_block), key block n tokens [n * key_block, ...); the last
    of either may be ragged. Memory is linear in tokens.

    Attributes:
        block_id_BGQJ: int32, distinct over the first `count` entries, -1 after them. Any
            order is right; if blocks stand in the order in which the tokens of the query
            block first read them, no token's output depends on a later token even in how
            its sums are rounded.
        count_BGQ: int32, how many entries of a list are real; 0 for a query block that reads nothing.
        token_mask_BGQJ: uint32 or None. Bit t says that token t of the query block reads this key block, so that a list
            is the union of its tokens' choices while each token attends to its own. None: every token reads the list.
        query_block: tokens; at most 32 where there is a token mask.
        key_block: tokens.
    """

    block_id_BGQJ: jax.Array
    count_BGQ: jax.Array
    token_mask_BGQJ: jax.Array | None
    query_block: int = dataclasses.field(metadata={"static": True})
    key_block: int = dataclasses.field(metadata={"static": True})

    def check(self, q_BTHK, k_BSGK) -> None:
        """Raises ValueError unless the lists fit these queries and keys; looks at shapes and dtypes, not at values."""
        sizes = shapes.check(
            q_BTHK=q_BTHK,
            k_BSGK=k_BSGK,
            block_id_BGQJ=self.block_id_BGQJ,
            count_BGQ=self.count_BGQ,
            token_mask_BGQJ=self.token_mask_BGQJ,
        )
        if sizes["H"] % sizes["G"]:
            raise ValueError(
                f"H={sizes['H']} is no multiple of G={sizes['G']}: query heads share key/value heads evenly"
            )
        if self.query_block < 1 or self.key_block < 1:
            raise ValueError(
                f"query_block={self.query_block} and key_block={self.key_block} must be at least 1 token"
            )
        if sizes["Q"] != -(-sizes["T"] // self.query_block):
            raise ValueError(
                f"Q={sizes['Q']} lists for T={sizes['T']} tokens in blocks of {self.query_block}: "
                f"{-(-sizes['T'] // self.query_block)} are needed"
            )
        if self.block_id_BGQJ.dtype != jnp.int32 or self.count_BGQ.dtype != jnp.int32:
            raise ValueError(
                f"block_id is {self.block_id_BGQJ.dtype} and count {self.count_BGQ.dtype}; both must be int32"
            )
        if self.token_mask_BGQJ is None:
            return
        if self.token_mask_BGQJ.dtype != jnp.uint32:
            raise ValueError(
                f"token_mask is {self.token_mask_BGQJ.dtype}; it must be uint32"
            )
        if self.query_block > MAX_MASKED_TOKENS:
            raise ValueError(
                f"query_block={self.query_block} with a token mask; {MAX_MASKED_TOKENS} tokens fit in its bits"
            )
