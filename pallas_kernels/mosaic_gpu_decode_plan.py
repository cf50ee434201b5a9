"""What the decoding kernel for Hopper GPUs knows while it is traced: sizes, memory, places.

A thread block works on a *piece* of a list with a *part*: 64 rows, one tile. A *unit* is the
query heads of one token that share a list, or 64 of them: `unit_rows` rows of a part. What a
unit has more than there are heads, copies fill with zeros and cut off.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_logits, mosaic_gpu_plan, tiles

PART = mosaic_gpu_plan.PART


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call; letters as in `shapes`, K padded. A key tile has 64 rows."""

    B: int
    T: int
    H: int
    G: int
    K: int
    J: int
    num_keys: int
    key_block: int
    dtype: jnp.dtype
    scale: float
    has_mask: bool
    pieces: int
    tiles: tiles.HopperDecodeTiles
    interpreted: bool

    @property
    def heads(self):
        """Query heads that share a key/value head."""
        return self.H // self.G

    @property
    def unit_rows(self):
        """A power of two, and at least what a copy needs."""
        return min(PART, max(8, _next_power(self.heads)))

    @property
    def token_units(self):
        """Units of a token."""
        return -(-self.heads // self.unit_rows)

    @property
    def units(self):
        """Units that share a list."""
        return self.T * self.token_units

    @property
    def part_units(self):
        """Units of a part, which is what a thread block works on."""
        return PART // self.unit_rows

    @property
    def parts(self):
        """Parts that share a list."""
        return -(-self.units // self.part_units)

    @property
    def piece_rows(self):
        """Rows that a piece hands over; those of all pieces fill tiles of 64."""
        rows = _next_power(min(self.units, self.part_units)) * self.unit_rows
        return max(rows, PART // self.pieces)

    @property
    def blocks(self):
        """Key blocks that a key tile gathers."""
        return PART // self.key_block


class Inputs(NamedTuple):
    """What the kernel reads, in device memory, where the caller has it.

    `q_BTGHK` has at most 8 heads, or a multiple of 8: H/G.
    """

    q_BTGHK: Any
    k_BSGK: Any
    v_BSGK: Any
    block_id_BGQJ: Any
    count_BGQ: Any
    token_mask_BGQJ: Any  # int32, or None
    position_B: Any


class Outputs(NamedTuple):
    """The result, and what pieces hand over; None if there is one piece only."""

    out_BTGHK: Any
    lse_rows: Any
    piece_out: Any
    piece_lse: Any


class Shared(NamedTuple):
    """Shared memory. The lse of rows lies where keys lay: 1 KB more, and no two would fit."""

    q: Any
    k_or_lse: Any
    v: Any

    @property
    def k(self):
        return self.k_or_lse[0]

    @property
    def lse(self):
        return self.k_or_lse[1]


class Barriers(NamedTuple):
    """One each: a stage (k, v and their release), a thread block (the others).

    `written` says that all pieces have handed over, `joined` that their rows have come.
    """

    q: Any
    k: Any
    v: Any
    k_free: Any
    v_free: Any
    joined: Any
    written: Any


class Place(NamedTuple):
    """What a thread block works on: batch, key/value head, part, piece."""

    b: Any
    g: Any
    part: Any
    piece: Any


class Rows(NamedTuple):
    """A part's rows, int32[64]: their tokens, the last keys they may read, are they real."""

    token: Any
    limit: Any
    is_real: Any


def shared_types(plan):
    """Shared memory of a thread block."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matrix(*shape):
        return plgpu.SMEM((*shape, plan.K), plan.dtype, transforms=transforms)

    ring = (plan.tiles.stages, PART)
    return Shared(
        q=matrix(PART),
        k_or_lse=plgpu.RefUnion(matrix(*ring), plgpu.SMEM((PART,), jnp.float32)),
        v=matrix(*ring),
    )


def barrier_types(plan):
    """Barriers of a thread block. One that gathers counts an arrival a copy."""
    stages, barrier = plan.tiles.stages, plgpu.Barrier
    return Barriers(
        q=barrier(num_arrivals=min(plan.units, plan.part_units)),
        k=barrier(num_arrivals=plan.blocks, num_barriers=stages),
        v=barrier(num_arrivals=plan.blocks, num_barriers=stages),
        k_free=barrier(num_barriers=stages),
        v_free=barrier(num_barriers=stages),
        joined=barrier(num_arrivals=2),
        written=plgpu.ClusterBarrier(collective_axes=("piece",))
        if plan.pieces > 1
        else None,
    )


def locate(plan):
    """What this thread block works on."""
    rest, part = mosaic_gpu_plan.divide(lax.axis_index("program"), plan.parts)
    b, g = mosaic_gpu_plan.divide(rest, plan.G)
    return Place(b, g, part, lax.axis_index("piece"))


def measure(plan, inputs, place):
    """Entries of the list, and key tiles of this piece of it."""
    count = inputs.count_BGQ[place.b, place.g, 0]
    num_tiles, _ = mosaic_gpu_plan.divide(count + (plan.blocks - 1), plan.blocks)
    steps, _ = mosaic_gpu_plan.divide(
        num_tiles + (plan.pieces - 1) - place.piece, plan.pieces
    )
    return count, steps


def first_entry(plan, place, step):
    """The entry of the list at which a piece's key tile begins."""
    return (step * plan.pieces + place.piece) * plan.blocks


def read_list(plan, x_BGQJ_ref, place, entry):
    """The words of a key tile's entries. What lies behind the list repeats its last word."""
    last = jnp.int32(plan.J - 1)
    return [
        x_BGQJ_ref[place.b, place.g, 0, jnp.minimum(entry + p, last)]
        for p in range(plan.blocks)
    ]


def list_units(plan, place):
    """For each unit of a part: its rows there, its place in BTGHK, is there such a unit."""
    units = []
    for u in range(min(plan.units, plan.part_units)):
        unit = place.part * plan.part_units + u
        token, share = mosaic_gpu_plan.divide(
            jnp.minimum(unit, plan.units - 1), plan.token_units
        )
        # There may be fewer heads, on which a copy doesn't touch what comes next.
        heads = pl.ds(share * plan.unit_rows, plan.unit_rows)
        rows = pl.ds(u * plan.unit_rows, plan.unit_rows)
        units.append((rows, (place.b, token, place.g, heads), unit < plan.units))
    return units


def describe_rows(plan, inputs, place):
    """The rows of a part."""
    row = plgpu.broadcasted_iota(jnp.int32, (PART,), 0, layout=mosaic_gpu_logits.ROW)
    unit = place.part * plan.part_units + (row >> (plan.unit_rows.bit_length() - 1))
    token = unit
    if plan.token_units > 1:  # Each is a part then.
        part_token, _ = mosaic_gpu_plan.divide(place.part, plan.token_units)
        token = jnp.full_like(unit, part_token)
    limit = jnp.minimum(token + inputs.position_B[place.b], plan.num_keys - 1)
    return Rows(token, limit, unit < plan.units)


def _next_power(x):
    """The smallest power of two that is at least x."""
    return 1 << (x - 1).bit_length()
