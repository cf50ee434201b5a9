"""What a Mosaic GPU kernel knows while it is traced: sizes, rules, and where a row belongs.

The rows of a list are its query tokens times the H/G query heads that share it, head after
head: row r is token r % query_block of head r // query_block. A *part* is 64 of them, the
rows of one tensor core instruction and the work of one consumer warpgroup.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import tiles

PART = 64
"""Rows of a part."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and rules of one call; letters as in `shapes`, padded except for `num_keys`."""

    B: int
    H: int
    G: int
    K: int
    Q: int
    J: int
    query_block: int
    key_block: int
    num_keys: int
    dtype: jnp.dtype
    scale: float
    causal: bool
    score_mod: Callable | None
    mask_mod: Callable | None
    has_mask: bool
    has_bias: bool
    has_segments: bool
    tiles: tiles.HopperForwardTiles
    interpreted: bool

    @property
    def heads(self):
        """Query heads that share a key/value head."""
        return self.H // self.G

    @property
    def head_rows(self):
        """Rows that a part has of one head: a copy's length."""
        return min(self.query_block, PART)

    @property
    def part_heads(self):
        """Heads of a part, or 1 if it is a piece of one."""
        return PART // self.head_rows

    @property
    def token_parts(self):
        """Parts over which the tokens of a query block are spread."""
        return self.query_block // self.head_rows

    @property
    def list_tiles(self):
        """Tiles that read the same list."""
        rows = self.heads * self.query_block
        return -(-rows // (PART * self.tiles.parts))

    @property
    def list_parts(self):
        """Parts that read the same list, with those of padding."""
        return self.list_tiles * self.tiles.parts

    @property
    def num_tiles(self):
        """Tiles of the whole call."""
        return self.B * self.G * self.Q * self.list_tiles

    @property
    def blocks(self):
        """Key blocks that a key tile gathers."""
        return self.tiles.keys // self.key_block
