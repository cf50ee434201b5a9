"""Tiles of a Mosaic TPU kernel: gathered along a list, several ahead of the one that is worked on.

A ring of tiles in VMEM, each filled by one copy for every entry of the list and everything
that the entry names. Programs run in order, so a program that nears the end of its list
starts on the next program's: the memory is busy all the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu_plan

COUNT, ENTRIES = mosaic_tpu_plan.COUNT, mosaic_tpu_plan.ENTRIES


class Lists(NamedTuple):
    """A program's list and that of the next program, in SMEM, and where the program stands."""

    own_ref: Any
    next_ref: Any
    program: Any
    is_first: Any
    is_last: Any


class Stream(NamedTuple):
    """What an entry names: source_ref[locate(program, entry)], copied to buffer_ref[slot, p]."""

    source_ref: Any
    buffer_ref: Any
    locate: Callable


class Ring(NamedTuple):
    """Scratch: a semaphore a slot; the slot of the next tile, and how many are under way."""

    arrived: Any
    state: Any


def ring_types(slots):
    """Scratch of a ring, without its buffers."""
    return Ring(pltpu.SemaphoreType.DMA((slots,)), pltpu.SMEM((2,), jnp.int32))


def buffer_type(source, slots, blocks):
    """Scratch of a stream from this array; None passes through."""
    if source is None:
        return None
    return pltpu.VMEM((slots, blocks, *source.shape[1:]), source.dtype)


def read_lists(inputs, length):
    """The lists of the program that runs now; `inputs` has `lists` and `next_lists`."""
    core, step = pl.program_id(0), pl.program_id(1)
    return Lists(
        inputs.lists.at[0],
        inputs.next_lists.at[0],
        core * length + step,
        step == 0,
        step == length - 1,
    )


def list_specs(lists, length):
    """Specs of `lists` and `next_lists`, streamed to SMEM program by program."""

    def following(program):
        return jnp.minimum(program + 1, lists.shape[0] - 1)

    return (
        mosaic_tpu_plan.blocked(lists, length, space=pltpu.SMEM),
        mosaic_tpu_plan.blocked(lists, length, following, space=pltpu.SMEM),
    )


def walk(lists, ring, streams, blocks, work):
    """Calls work(slot, entry) for each tile of a list; `entry` is the tile's first.

    Entries of the last tile that are past the list's count are copied too: they must name
    what exists, and `work` must mask them.
    """
    slots = ring.arrived.shape[0]
    streams = [x for x in streams if x.source_ref is not None]

    def tiles_of(ref):
        return lax.div(ref[COUNT] + (blocks - 1), jnp.int32(blocks))

    num_tiles = tiles_of(lists.own_ref)
    num_next = jnp.where(lists.is_last, 0, tiles_of(lists.next_ref))

    @pl.when(lists.is_first)
    def _start():
        ring.state[0] = 0
        ring.state[1] = 0

    first_slot = ring.state[0]

    def fetch(tile, _):
        is_own = tile < num_tiles
        program = jnp.where(is_own, lists.program, lists.program + 1)
        entry = ENTRIES + jnp.where(is_own, tile, tile - num_tiles) * blocks
        slot = lax.rem(first_slot + tile, jnp.int32(slots))
        for p in range(blocks):
            named = jnp.where(
                is_own, lists.own_ref[entry + p], lists.next_ref[entry + p]
            )
            for stream in streams:
                pltpu.make_async_copy(
                    stream.source_ref.at[stream.locate(program, named)],
                    stream.buffer_ref.at[slot, p],
                    ring.arrived.at[slot],
                ).start()

    def fetch_ahead(tile):
        """Keeps the ring full while `tile` is worked on."""
        end = jnp.minimum(tile + slots, num_tiles + num_next)
        lax.fori_loop(ring.state[1], end, fetch, None)
        ring.state[1] = end

    @pl.loop(0, num_tiles)
    def _work(tile):
        fetch_ahead(tile)
        slot = lax.rem(first_slot + tile, jnp.int32(slots))
        for stream in streams:
            # Waits for as many bytes as the tile has, whichever copies they came with.
            tile_ref = stream.buffer_ref.at[slot]
            pltpu.make_async_copy(tile_ref, tile_ref, ring.arrived.at[slot]).wait()
        work(slot, tile * blocks)

    pl.when(num_tiles == 0)(lambda: fetch_ahead(0))
    ring.state[0] = lax.rem(first_slot + num_tiles, jnp.int32(slots))
    ring.state[1] = ring.state[1] - num_tiles
