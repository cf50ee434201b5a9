"""What a Mosaic GPU kernel knows while it is traced: sizes, rules, and where a tile belongs.

The rows of a list are its query tokens times the H/G query heads that share it, head after
head: row r is token r % query_block of head r // query_block. Those of query blocks of less
than `LONG` stand token after token: row r is head r % (H/G) of token r // (H/G). So a *run*,
the rows of one head or one token, has several for a copy to take. A *part* is 64 rows, those
of one tensor core instruction and the work of one consumer warpgroup.
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
LONG = 16
"""Tokens of the shortest query block whose rows stand head after head."""
HEAD = 32
"""Words after a list's entries: how many there are, how many are whole; 128 bytes."""
LOG2E = math.log2(math.e)


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
    tiles: tiles.HopperListTiles | tiles.HopperKeyTiles
    processors: int
    interpreted: bool

    @property
    def heads(self):
        """Query heads that share a key/value head."""
        return self.H // self.G

    @property
    def by_token(self):
        """Whether the rows of a list stand token after token."""
        return self.query_block < LONG

    @property
    def run_rows(self):
        """Rows of one head or, by token, of one token."""
        return self.heads if self.by_token else self.query_block

    @property
    def slice_rows(self):
        """Rows that a part has of one run: a copy's length."""
        return min(self.run_rows, PART)

    @property
    def part_slices(self):
        """Runs of a part, or 1 if it is a piece of one."""
        return PART // self.slice_rows

    @property
    def token_parts(self):
        """Parts over which the tokens of a query block are spread."""
        if self.by_token:
            return self.num_parts
        return self.query_block // self.slice_rows

    @property
    def tile_token_parts(self):
        """Parts over which the tokens of a tile are spread."""
        return min(self.token_parts, self.tiles.parts)

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
    def laps(self):
        """Tiles that a team works on if its thread block is one of the first `processors`.

        The others work on one tile a team: an eighth of all, which even out the load.
        """
        if self.tiles.buffers == 1:
            return 1
        return max(1, self._num_rounds * 7 // (8 * self.processors))

    @property
    def programs(self):
        """Thread blocks."""
        return self._num_rounds - (self.laps - 1) * self.processors

    @property
    def _num_rounds(self):
        """Tiles of a team, if there were one thread block only."""
        return -(-self.num_tiles // self.tiles.teams)

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

    `lists`, int32[B, G, Q, J + HEAD], holds block ids, their number, and how many of them, at
    the start of a list, all its rows read whole.
    `bias_rows`, [B, G, Q, J, rows], and `segment_rows`, [B, Q, rows], hold what belongs to
    the rows of `token_parts` parts: the tokens of a query block, repeated to fill a part or,
    by token, each as often as there are heads.
    The backward passes read `lse_rows` and `delta_rows`, float32[B, G, Q, rows] of all
    parts: the lse in bits, inf for a row that reads nothing, and what is subtracted from
    the cotangent of a row's weights.
    """

    q_BTHK: Any
    k_BSGK: Any
    v_BSGK: Any
    lists: Any
    first_id_BQ: Any  # of the first token of each query block
    key_offset_1: Any
    token_mask_BGQJ: Any = None  # int32
    bias_rows: Any = None
    segment_rows: Any = None
    segment_key_BS: Any = None
    d_out_BTHK: Any = None
    lse_rows: Any = None
    delta_rows: Any = None


class Place(NamedTuple):
    """A tile's place: batch, key/value head, query block, first part."""

    b: Any
    g: Any
    i: Any
    part: Any


class Extent(NamedTuple):
    """How much of a list there is to read: entries, key tiles, those that need no mask."""

    count: Any
    steps: Any
    whole_steps: Any


def count_laps(plan):
    """Tiles on which this thread block's teams work, one after another."""
    if plan.laps == 1:
        return 1
    return jnp.where(lax.axis_index("program") < plan.processors, plan.laps, 1)


def each_lap(plan, body, carry):
    """Calls `body(lap, carry)` for each tile of a team. Returns the last carry."""
    return lax.fori_loop(0, count_laps(plan), body, carry)


def each_step(plan, entries, body, carry):
    """Calls `body(step, part, entry, carry)` for each part of a piece's entries.

    A part of all of them before the next part: entries differ in the keys that they read,
    and so in the consumers that they keep busy; the parts of one don't.
    """

    def each_entry(part, carry):
        def run(entry, carry):
            return body(part * entries + entry, part, entry, carry)

        return lax.fori_loop(0, entries, run, carry)

    return lax.fori_loop(0, plan.num_parts, each_entry, carry)


def rotate(number, slots, owner):
    """Where the owner of so many slots in a row keeps its next thing, which has a number."""
    return owner * slots + lax.rem(number, jnp.int32(slots))


def locate(plan, team, lap):
    """The place of a team's tile. Late query blocks, whose lists are long, come first."""
    program = lax.axis_index("program")
    if plan.laps > 1:
        lap = jnp.where(program < plan.processors, lap, plan.laps - 1)
    # The last thread block may have a team too many: it repeats the last tile.
    tile = (program + lap * plan.processors) * plan.tiles.teams + team
    tile = jnp.minimum(tile, plan.num_tiles - 1)
    rest, part = divide(tile, plan.list_tiles)
    rest, i = divide(rest, plan.Q)
    b, g = divide(rest, plan.G)
    return Place(b, g, plan.Q - 1 - i, part * plan.tiles.parts)


def measure(plan, list_ref):
    """The extent of a list in shared memory."""
    count = list_ref[plan.J]
    steps, _ = divide(count + (plan.blocks - 1), plan.blocks)
    whole_steps, _ = divide(list_ref[plan.J + 1], plan.blocks)
    return Extent(count, steps, whole_steps)


def stretches(plan, extent):
    """Stretches of the key tiles to read: without masks or not, first step, and end."""
    if not plan.has_whole_blocks:
        return [(False, 0, extent.steps)]
    return [(True, 0, extent.whole_steps), (False, extent.whole_steps, extent.steps)]


def divide(x, y):
    """Quotient and remainder of what isn't negative."""
    y = jnp.int32(y)
    return lax.div(x, y), lax.rem(x, y)


def slice_part(plan, place, part):
    """For each slice of a part: its rows there, its place in BTHK, is it real.

    A row of padding repeats the last head, and isn't stored.

    Args:
        place: batch, key/value head and query block.
    """
    b, g, i = place
    slices = []
    for first in range(0, PART, plan.slice_rows):
        run, start = divide(part * PART + first, plan.run_rows)
        token, head, real = i * plan.query_block, g * plan.heads, True
        if plan.by_token:
            token, head = token + run, pl.ds(head + start, plan.slice_rows)
        else:
            token = pl.ds(token + start, plan.slice_rows)
            head, real = head + jnp.minimum(run, plan.heads - 1), run < plan.heads
        slices.append((pl.ds(first, plan.slice_rows), (b, token, head), real))
    return slices
