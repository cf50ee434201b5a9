"""Who reads a key tile, for the pass for dK and dV: rows of query blocks, cut into pieces.

A key tile holds several adjacent key blocks. A query block that lists more than one of them
is read once for all, with a word a block that says which of its tokens read that block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import transpose


class Readers(NamedTuple):
    """Rows of query blocks, one a key tile, and their pieces; E entries, P pieces.

    `table_BGFE`, int32, has a column for each query block that reads a tile, in the order of
    tiles. Its fields: the query block; for each block of the tile a word, whose bit t says
    that token t reads it (without token masks: 1 if the query block does, else 0); and, with
    a bias, for each block the slot of the list in which it stands.
    """

    table_BGFE: Any
    tile_BGP: Any
    first_BGP: Any
    last_BGP: Any
    first_piece_BGN: Any  # one more than there are tiles


def collect(plan, block_id_BGQJ, count_BGQ, token_mask_BGQJ, num_tiles, length):
    """Turns lists into rows of readers.

    Args:
        num_tiles: key tiles, of `plan.blocks` key blocks each.
        length: most entries of a piece.
    """
    readers = transpose.transpose(block_id_BGQJ // plan.blocks, count_BGQ, num_tiles)
    if token_mask_BGQJ is None:
        token_mask_BGQJ = jnp.ones_like(block_id_BGQJ)

    def merge(entry_E, first_N, block_id_QJ, mask_QJ):
        """The columns of one list of lists, and where each tile's begin."""
        J, E = block_id_QJ.shape[1], entry_E.shape[0]
        i, slot = entry_E // J, entry_E % J
        block_id, word = block_id_QJ[i, slot], mask_QJ[i, slot]
        tile, block = block_id // plan.blocks, block_id % plan.blocks
        position = jnp.arange(E, dtype=jnp.int32)
        same = (tile == jnp.roll(tile, 1)) & (i == jnp.roll(i, 1)) & (position > 0)
        is_new = (position < first_N[-1]) & ~same
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_new)])
        place = jnp.where(position < first_N[-1], before[1:] - 1, E)

        def field(x, *index):
            shape = (plan.blocks, E) if index else (E,)
            empty = jnp.zeros(shape, jnp.int32)
            return empty.at[*index, place].set(x, mode="drop")

        fields = [field(i)[None], field(word, block)]
        if plan.has_bias:
            fields.append(field(slot, block))
        return jnp.concatenate(fields), before[first_N]

    table_BGFE, first_BGN = jax.vmap(jax.vmap(merge))(
        readers.entry, readers.first, block_id_BGQJ, token_mask_BGQJ
    )
    pieces = transpose.cut(transpose.Readers(readers.entry, first_BGN), length)
    return Readers(
        table_BGFE, pieces.block_id, pieces.first, pieces.last, pieces.first_piece
    )
