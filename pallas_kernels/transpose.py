"""Lists the other way round: for each key block, who reads it. Serves dK and dV on GPU and TPU.

Compressed rows, made on the device from Q*J entries for each list of lists, never a table of
key blocks times query blocks. The order within a row is that of the query blocks, so sums
over a row give the same bits every time.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Readers:
    """Which query blocks read each key block, and in which slot of their lists.

    The readers of key block n are `entry[b, g, first[b, g, n] : first[b, g, n + 1]]`.

    Attributes:
        entry: int32[B, G, Q * J]. Query block and slot in one number, i * J + j; ascending
            within a row, -1 after the end of the last row.
        first: int32[B, G, N + 1], ascending from 0; the last counts all entries.
    """

    entry: jax.Array
    first: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pieces:
    """Rows of `Readers` cut into pieces of bounded length, for programs of similar work.

    A block that everybody reads (a sink) makes one row as long as there are query blocks:
    its pieces are summed up afterwards, those of a block stand together.

    Attributes:
        block_id: int32[B, G, P], ascending, with P = `max_pieces`; N where there is no piece.
        first, last: int32[B, G, P]: the piece's entries are `entry[..., first:last]`.
        first_piece: int32[B, G, N + 1]: the pieces of block n are first_piece[n] up to
            first_piece[n + 1], which it doesn't include.
    """

    block_id: jax.Array
    first: jax.Array
    last: jax.Array
    first_piece: jax.Array


def transpose(block_id_BGQJ, count_BGQ, num_blocks):
    """Turns lists of key blocks per query block into rows of query blocks per key block.

    Args:
        block_id_BGQJ, count_BGQ: as in `BlockSelection`; entries past `count` don't matter.
        num_blocks: N, key blocks; no listed id is larger.
    Raises:
        ValueError: entries of one list of lists can't be counted in int32.
    """
    shapes.check(block_id_BGQJ=block_id_BGQJ, count_BGQ=count_BGQ)
    Q, J = block_id_BGQJ.shape[2:]
    if Q * J >= 2**31:
        raise ValueError(
            f"Q={Q} lists of J={J} pass 2^31 entries: transpose fewer query blocks at once"
        )
    listed_BGQJ = jnp.arange(J, dtype=jnp.int32) < count_BGQ[..., None]
    key_BGQJ = jnp.where(listed_BGQJ, block_id_BGQJ, num_blocks)

    def sort(key_QJ):
        key = key_QJ.reshape(-1)
        size_N = jnp.zeros(num_blocks, jnp.int32).at[key].add(1, mode="drop")
        first = _sum_before(size_N)
        entry = jnp.argsort(key, stable=True).astype(jnp.int32)
        return Readers(jnp.where(jnp.arange(Q * J) < first[-1], entry, -1), first)

    return jax.vmap(jax.vmap(sort))(key_BGQJ)


def max_pieces(num_entries, num_blocks, length):
    """Bound on the pieces of rows that have `num_entries` in all: each has one that isn't full."""
    return num_blocks + num_entries // length


def cut(readers, length):
    """Cuts rows into pieces of at most `length` entries; an empty row has none."""
    num_blocks = readers.first.shape[-1] - 1
    num_pieces = max_pieces(readers.entry.shape[-1], num_blocks, length)

    def cut_rows(first):
        size_N = first[1:] - first[:-1]
        first_piece = _sum_before(-(-size_N // length))
        piece = jnp.arange(num_pieces, dtype=jnp.int32)
        block_id = jnp.searchsorted(first_piece[1:], piece, side="right")
        block_id = block_id.astype(jnp.int32)
        row = jnp.minimum(block_id, num_blocks - 1)
        start = first[row] + (piece - first_piece[row]) * length
        end = jnp.minimum(start + length, first[row + 1])
        real = block_id < num_blocks
        return Pieces(
            block_id, jnp.where(real, start, 0), jnp.where(real, end, 0), first_piece
        )

    return jax.vmap(jax.vmap(cut_rows))(readers.first)


def _sum_before(size_N):
    """What stands before each, and before the end: N + 1 numbers."""
    return jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.cumsum(size_N).astype(jnp.int32)]
    )
