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
        ValueError: entries of one list of lists, or all key blocks, pass int32.
    """
    shapes.check(block_id_BGQJ=block_id_BGQJ, count_BGQ=count_BGQ)
    B, G, Q, J = block_id_BGQJ.shape
    if B * G * (num_blocks + 1) >= 2**31:
        raise ValueError(
            f"{B * G} x {num_blocks} key blocks pass 2^31: transpose fewer heads at once"
        )
    if Q * J >= 2**31:
        raise ValueError(
            f"Q={Q} lists of J={J} pass 2^31 entries: transpose fewer query blocks at once"
        )
    # All lists in one sort: XLA sorts one long array in parallel. Not timed against a batch of sorts on a GPU yet.
    row_BG = jnp.arange(B * G, dtype=jnp.int32).reshape(B, G) * (num_blocks + 1)
    listed_BGQJ = jnp.arange(J, dtype=jnp.int32) < count_BGQ[..., None]
    key_BGQJ = jnp.where(listed_BGQJ, block_id_BGQJ, num_blocks)
    key_BGQJ += row_BG[..., None, None]
    entry_QJ = jnp.arange(Q * J, dtype=jnp.int32).reshape(Q, J)
    entry_BGQJ = jnp.where(listed_BGQJ, entry_QJ, -1)
    key, entry = jax.lax.sort(
        (key_BGQJ.reshape(-1), entry_BGQJ.reshape(-1)), num_keys=1, is_stable=True
    )
    key_BGE = key.reshape(B, G, Q * J)
    bounds_BGN = row_BG[..., None] + jnp.arange(num_blocks + 1, dtype=jnp.int32)
    find = jax.vmap(jax.vmap(jnp.searchsorted))
    first_BGN = find(key_BGE, bounds_BGN).astype(jnp.int32)
    return Readers(entry.reshape(B, G, Q * J), first_BGN)


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
