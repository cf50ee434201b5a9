"""What a Mosaic GPU kernel knows while it is traced: sizes, rules, and where a tile belongs.

The rows of a list are its query tokens times the H/G query heads that share it, head after
head: row r is token r % query_block of head r // query_block. A *part* is 64 of them, the
rows of one tensor core instruction and the work of one consumer warpgroup.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles

PART = 64
"""Rows of a part."""
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and rules of one call; letters as in `shapes`, padded except for `num_keys`.

    `pieces` consecutive lists belong to the same queries: parts of one list.
    """

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
    tiles: tiles.HopperListTiles | tiles.HopperKeyTiles
    interpreted: bool
    pieces: int = 1

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
    def num_parts(self):
        """Parts that have a row of a list's."""
        return -(-self.heads * self.query_block // PART)

    @property
    def list_tiles(self):
        """Tiles that read the same list."""
        return -(-self.num_parts // self.tiles.parts)

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

    @property
    def has_whole_blocks(self):
        """Whether blocks that all rows of a list read whole come first, free of masks.

        A token mask forbids it: rounding must not depend on what later tokens read. A bias
        belongs to a place in the list; segments and a `mask_mod` hold everywhere.
        """
        masked = self.has_mask or self.has_segments or self.mask_mod is not None
        return not (masked or self.has_bias)

    @property
    def is_scaled(self):
        """Whether logits are scaled before the softmax, and not by its multiplication."""
        return self.score_mod is not None or self.has_bias or self.scale <= 0

    @property
    def to_bits(self):
        """What turns a logit into a power of two."""
        return LOG2E if self.is_scaled else self.scale * LOG2E


class Operands(NamedTuple):
    """What the kernel reads, in device memory; padded. None: not part of this call.

    `bias_rows`, [B, G, Q, J, rows], and `segment_rows`, [B, Q, rows], hold what belongs to
    the rows of `token_parts` parts: the tokens of a query block, repeated to fill a part.
    The backward passes read `lse_rows` and `delta_rows`, float32[B, G, Q, rows] of all
    parts: the lse in bits, inf for a row that reads nothing, and what is subtracted from
    the cotangent of a row's weights.
    """

    q_BTHK: Any
    k_BSGK: Any
    v_BSGK: Any
    block_id_BGQJ: Any
    count_BGQ: Any
    first_id_BQ: Any  # of the first token of each query block
    key_offset_1: Any
    whole_BGQ: Any = None  # entries at the start of a list that all its rows read whole
    token_mask_BGQJ: Any = None  # int32
    bias_rows: Any = None
    segment_rows: Any = None
    segment_key_BS: Any = None
    d_out_BTHK: Any = None
    lse_rows: Any = None
    delta_rows: Any = None


class Place(NamedTuple):
    """A tile's place: batch, key/value head, query block, first part; key tiles to read.

    The first `whole_steps` of the key tiles need no mask.
    """

    b: Any
    g: Any
    i: Any
    part: Any
    count: Any
    steps: Any
    whole_steps: Any


def locate(plan, inputs, team):
    """The place of a team's tile. Late query blocks, whose lists are long, come first."""
    # The last thread block may have a team too many: it repeats the last tile.
    tile = lax.axis_index("program") * plan.tiles.teams + team
    tile = jnp.minimum(tile, plan.num_tiles - 1)
    rest, part = divide(tile, plan.list_tiles)
    rest, i = divide(rest, plan.Q)
    b, g = divide(rest, plan.G)
    i = plan.Q - 1 - i
    count = inputs.count_BGQ[b, g, i]
    steps = lax.div(count + (plan.blocks - 1), jnp.int32(plan.blocks))
    whole_steps = 0
    if plan.has_whole_blocks:
        whole_steps, _ = divide(inputs.whole_BGQ[b, g, i], plan.blocks)
    return Place(b, g, i, part * plan.tiles.parts, count, steps, whole_steps)


def stretches(plan, place):
    """Stretches of the key tiles to read: without masks or not, first step, and end."""
    masked = (False, place.whole_steps, place.steps)
    return [(True, 0, place.whole_steps), masked] if plan.has_whole_blocks else [masked]


def divide(x, y):
    """Quotient and remainder of what isn't negative."""
    y = jnp.int32(y)
    return lax.div(x, y), lax.rem(x, y)


def head_slices(plan, i, part):
    """For each head of a part: its rows there, tokens, head of the group, is it real.

    A row of padding repeats the last head, and isn't stored.
    """
    slices = []
    for first in range(0, PART, plan.head_rows):
        head, token = divide(part * PART + first, plan.query_block)
        tokens = pl.ds(i * plan.query_block + token, plan.head_rows)
        rows = pl.ds(first, plan.head_rows)
        last = jnp.minimum(head, plan.heads - 1)
        slices.append((rows, tokens, last, head < plan.heads))
    return slices
