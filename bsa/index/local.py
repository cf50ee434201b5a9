"""What each token reads without asking the index: sinks and a window, or its own chunk. Called by `route`, `unite`."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalView:
    """Blocks that a token always reads: [low, own] and [first, first + sink_blocks), never past its own.

    Attributes:
        low_BT: int32, block where the token's window begins; never before its document.
        first_BT: int32, block that holds the first token of the token's document.
        start_BT: int32, that first token's place in the row.
        own_BT: int32, block that holds each token.
        key_block: C, tokens.
        sink_blocks: blocks at the document's beginning that are always read.
        num_blocks: most window blocks that the tokens of one block can see, its own included.
    """

    low_BT: jax.Array
    first_BT: jax.Array
    start_BT: jax.Array
    own_BT: jax.Array
    key_block: int = dataclasses.field(metadata={"static": True})
    sink_blocks: int = dataclasses.field(metadata={"static": True})
    num_blocks: int = dataclasses.field(metadata={"static": True})

    @property
    def open_blocks(self) -> tuple[jax.Array, jax.Array]:
        """First block, and the one after the last, that each token may choose: whole ones of its document, no sinks."""
        whole_BT = -(-self.start_BT // self.key_block)
        low_BT = jnp.maximum(whole_BT, self.first_BT + self.sink_blocks)
        return low_BT, self.low_BT


def window(
    position_BT, *, window_tokens: int, sink_tokens: int, key_block: int, place_BT=None
) -> LocalView:
    """The last blocks, the token's own included, and the document's sinks.

    Args:
        position_BT: int32, tokens since the beginning of the token's document.
        window_tokens: of whole blocks, as all lengths here. A token sees at least window_tokens - C + 1 tokens back and itself.
        place_BT: int32, places in the row of part of its tokens; None: these are all of them.
    """
    shapes.check(position_BT=position_BT, place_BT=place_BT)
    num_blocks, sink_blocks = window_tokens // key_block, sink_tokens // key_block
    start_BT, own_BT = _places(position_BT, place_BT, key_block)
    first_BT = start_BT // key_block
    low_BT = jnp.maximum(own_BT - num_blocks + 1, first_BT)
    return LocalView(
        low_BT, first_BT, start_BT, own_BT, key_block, sink_blocks, num_blocks
    )


def chunk(position_BT, chunk_tokens: int, key_block: int, place_BT=None) -> LocalView:
    """The token's own chunk of its document, as the local layers of Llama 4 have it; no sinks.

    A chunk may begin inside a block: give the kernel `chunk_segments` as segment ids too. `place_BT` as for `window`.
    """
    shapes.check(position_BT=position_BT, place_BT=place_BT)
    start_BT, own_BT = _places(position_BT, place_BT, key_block)
    chunk_start_BT = start_BT + position_BT - position_BT % chunk_tokens
    num_blocks = (chunk_tokens - 1) // key_block + 2
    return LocalView(
        chunk_start_BT // key_block,
        start_BT // key_block,
        start_BT,
        own_BT,
        key_block,
        0,
        num_blocks,
    )


def chunk_segments(position_BT, chunk_tokens: int):
    """int32 ids that differ between documents and between the chunks of one; rising along a row."""
    shapes.check(position_BT=position_BT)
    return jnp.cumsum(position_BT % chunk_tokens == 0, axis=1, dtype=jnp.int32)


def _places(position_BT, place_BT, key_block):
    """Where each token's document starts, and each token's block."""
    if place_BT is None:
        place_T = jnp.arange(position_BT.shape[1], dtype=jnp.int32)
        place_BT = jnp.broadcast_to(place_T, position_BT.shape)
    return place_BT - position_BT, place_BT // key_block
