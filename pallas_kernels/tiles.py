"""Tile sizes of the kernels, per kind of device, and the date on which they were measured."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class HopperListTiles:
    """How a thread block divides the work on lists: the forward pass, and the one for dQ.

    Each team works on a tile of its own: as many consumer warpgroups as it has parts of 64
    rows, and one producer warpgroup that copies key tiles into a ring of stages.

    Attributes:
        teams: tiles that a thread block works on at once.
        parts: 64-row parts of a tile, each with a consumer warpgroup.
        keys: rows of a key tile, gathered from one or several key blocks.
        stages: key tiles in a team's ring.
        consumer_registers: a thread; with the producers' at most 65536 a thread block.
        producer_registers: a thread.
        buffers: for queries and lists. With 2 a thread block goes from tile to tile.
    """

    teams: int
    parts: int
    keys: int
    stages: int
    consumer_registers: int
    producer_registers: int
    buffers: int = 1

    @property
    def consumers(self):
        """Consumer warpgroups of a thread block."""
        return self.teams * self.parts


def hopper_processors(device):
    """Multiprocessors of a GPU; of an H100 or H200 for what is compiled without one."""
    return device.core_count if device.platform == "gpu" else 132


def hopper_forward(rows, K, entries):
    """Tiles for lists that `rows` rows (query heads x tokens) share, and head width K.

    Args:
        entries: of a list: long ones leave no room for a second buffer.

    The sizes fill the registers and the 227 KB of shared memory. On one H100 (32K tokens,
    2026-11-22) key tiles of 64 rows with 3 or 4 stages were 11-19% slower than 128 with 2;
    for at most 64 rows only these sizes were timed. With more rows a second buffer brings
    6% (blocks of 128); with at most 64 rows it was not timed.
    """
    if K > 128:
        parts, registers = (2, 232) if rows > 64 else (1, 240)
        return HopperListTiles(1, parts, 64, 2, registers, 40)
    if rows > 64:
        return HopperListTiles(1, 2, 128, 2, 232, 40, 2 if entries <= 512 else 1)
    return HopperListTiles(2, 1, 64, 2, 208, 40, 2 if entries <= 256 else 1)


@dataclasses.dataclass(frozen=True)
class HopperDecodeTiles:
    """How a thread block of one consumer and one producer warpgroup reads its piece of a list.

    Attributes:
        stages: key tiles of 64 rows in the ring.
        consumer_registers: a thread.
        producer_registers: a thread.
    """

    stages: int
    consumer_registers: int
    producer_registers: int


def hopper_decode(K):
    """Tiles for few query rows and head width K.

    About 96 KB on their way, where hiding 1 us at 2.4 TB/s takes 18 KB a multiprocessor. Up
    to K=128 two thread blocks fit on one, so that clusters need no free multiprocessors in a
    row. Not timed yet.
    """
    if K > 128:
        return HopperDecodeTiles(2, 232, 40)
    return HopperDecodeTiles(3 if K > 64 else 6, 128, 40)


MAX_PIECES = 8
"""Thread blocks of a cluster on any GPU that has clusters."""


def hopper_pieces(num_lists, num_tiles, processors):
    """Pieces into which lists are cut when there are few of them: a power of two.

    Args:
        num_tiles: key tiles of a list.

    At most a piece for each multiprocessor, and a key tile for each piece. Not timed yet.
    """
    pieces = MAX_PIECES
    while pieces > 1 and (pieces > num_tiles or pieces * num_lists > processors):
        pieces //= 2
    return pieces


def hopper_dq(rows, K, entries):
    """The same for dQ, whose consumers hold queries and the cotangent of their output.

    Args:
        entries: of a list: two teams have no room for two long lists.
    """
    if K <= 128 and rows > 64:
        return HopperListTiles(1, 2, 128, 2, 232, 40)
    if K > 128 or entries > 1024:
        return HopperListTiles(1, 1, 64, 2, 240, 40)
    return HopperListTiles(2, 1, 64, 2, 208, 40)


@dataclasses.dataclass(frozen=True)
class HopperKeyTiles:
    """How a thread block divides the work on a key tile: the pass for dK and dV.

    Two consumer warpgroups hold a key tile, a producer warpgroup copies to them, 64 rows a
    stage, the queries that read it and the cotangents of their outputs.

    Attributes:
        keys: rows of a key tile. Each consumer works on half of them; but on all, for dK
            or for dV, where a key block is as long as a tile of 64.
        stages: 64-row parts of queries in the ring.
        piece_steps: about the most parts of queries that one thread block reads.
        consumer_registers: a thread; with the producer's at most 65536 a thread block.
        producer_registers: a thread.
    """

    keys: int
    stages: int
    piece_steps: int
    consumer_registers: int
    producer_registers: int


def hopper_dkv(K):
    """Tiles for dK and dV of head width K; no others have been timed."""
    if K > 128:
        return HopperKeyTiles(64, 2, 256, 232, 40)
    return HopperKeyTiles(128, 4 if K > 64 else 6, 256, 232, 40)


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """How the Mosaic TPU kernels divide their work.

    Attributes:
        keys: rows of a key tile, gathered from one or several key blocks.
        rows: query rows (heads x tokens) gathered for a key block at once, backward.
        ring_bytes: VMEM for tiles that are on their way.
        max_slots: most tiles on their way.
        cores: TensorCores that share a JAX device and its programs.
    """

    keys: int
    rows: int
    ring_bytes: int
    max_slots: int
    cores: int


MEMORY_LATENCY_S = 1e-6
"""Time from a copy's start to its data, assumed: no TPU was at hand to measure it."""

INTERPRETED_TPU = TpuTiles(keys=32, rows=32, ring_bytes=2**20, max_slots=3, cores=1)
"""Small, so that short lists fill several tiles and a ring goes round."""


def tpu(info):
    """Tiles for a TPU, from what JAX knows of it: a `pltpu.TpuInfo`.

    A key tile is as wide as the matrix unit. Tiles on their way cover twice what the
    memory delivers in its latency. Never timed; MiB of VMEM that the compiler reports for
    bfloat16 heads of width 128, smallest and largest of experiments/tpu_roofline.py's
    shapes (libtpu 0.0.50, 2026-11-22):

    | | keys | ring | forward | dQ | dK, dV |
    |---|---|---|---|---|---|
    | v5e | 128 | 1.6 | 1.1-1.8 | 1.2-2.1 | 1.6-1.8 |
    | v5p | 128 | 2.3 | 1.1-1.8 | 1.2-2.1 | 2.3-2.6 |
    | v6e | 256 | 3.1 | 2.1-2.9 | 2.2-3.1 | 3.1-3.4 |
    | TPU7x | 256 | 7.0 | 2.1-2.9 | 2.2-3.0 | 4.1-4.4 |

    Of 16 MiB that a kernel gets unless it asks for more; `max_slots` bounds most rings.
    """
    in_flight = info.mem_bw_bytes_per_second * MEMORY_LATENCY_S
    return TpuTiles(
        keys=info.mxu_column_size,
        rows=512,
        ring_bytes=int(2 * in_flight),
        max_slots=16,
        cores=info.num_cores,
    )


@dataclasses.dataclass(frozen=True)
class TritonTiles:
    """How a Triton program divides its work.

    Attributes:
        rows: query rows (heads x tokens) of a tile, at most.
        keys: keys of a tile, gathered from one or several key blocks; at most, for dK and
            dV, whose tiles are single blocks.
        warps: of a program.
        stages: tiles on their way and in use.
        piece_steps: for dK and dV, about the most tiles of rows that one program reads.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    piece_steps: int = 0


TRITON_WIDEST = 256
"""Head width for which there are tiles."""

SMALL_SHARED = (86, 89, 120, 121)
"""Compute capabilities, times ten, with 99 KB of shared memory for a program; others that
have these kernels have 163 KB at least (CUDA programming guide)."""


def triton_forward(rows, K, size, capability):
    """Tiles for lists that `rows` rows share, head width K and elements of `size` bytes.

    Like all of Triton's here, chosen by what compiles without spilling many registers and
    fits the shared memory (Triton 3.6, 2026-11-22), beside FlexAttention's choices for
    A100 (PyTorch 2.14); never timed on Ampere or Ada. Block ids take a stage of their own,
    so 3 stages keep one tile on its way, and 5 two.
    """
    if size > 2:
        return _float32(K)
    if K > 128:
        return TritonTiles(64, 32, 8, 3)
    if rows <= 64:  # Two such programs share a multiprocessor.
        return TritonTiles(64, 64, 4, 3)
    stages = 3 if capability in SMALL_SHARED else 5
    return TritonTiles(128, 64, 8 if K > 64 else 4, stages)


def triton_dq(rows, K, size, capability):
    """The same for dQ, whose programs hold queries and the cotangent of their output."""
    small = capability in SMALL_SHARED
    if size > 2:
        return _float32(K)
    if K > 128:
        return TritonTiles(32, 32, 4, 3) if small else TritonTiles(64, 32, 8, 3)
    if rows <= 64 or (K > 64 and small):
        return TritonTiles(64, 64, 4, 3)
    return TritonTiles(128, 64, 8, 3)


def triton_dkv(K, size, capability, key_block):
    """The same for dK and dV, whose tiles are single key blocks, or halves of them."""
    if size > 2:
        sizes = _float32(K)
    elif K > 128:
        sizes = TritonTiles(32, 32, 4, 3)
    elif key_block == 128 and capability == 90:
        sizes = TritonTiles(64, 128, 8, 3)
    else:
        sizes = TritonTiles(64, 64, 4, 3)
    return dataclasses.replace(sizes, piece_steps=256)


def _float32(K):
    """Tiles of all passes in float32, which is multiplied without tensor cores."""
    return TritonTiles(16 if K > 128 else 32, 16, 4, 3)
