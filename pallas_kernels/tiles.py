"""Tile sizes of the kernels, per kind of device, and the date on which they were measured."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class HopperForwardTiles:
    """How a thread block of the Mosaic GPU forward pass divides its work.

    Each team works on a tile of its own: as many consumer warpgroups as it has parts of 64
    rows, and one producer warpgroup that copies key tiles into a ring of stages.

    Attributes:
        teams: tiles that a thread block works on at once.
        parts: 64-row parts of a tile, each with a consumer warpgroup.
        keys: rows of a key tile, gathered from one or several key blocks.
        stages: key tiles in a team's ring.
        consumer_registers: a thread; with the producers' at most 65536 a thread block.
        producer_registers: a thread.
    """

    teams: int
    parts: int
    keys: int
    stages: int
    consumer_registers: int
    producer_registers: int

    @property
    def consumers(self):
        """Consumer warpgroups of a thread block."""
        return self.teams * self.parts


def hopper_forward(rows, K):
    """Tiles for lists that `rows` rows (query heads x tokens) share, and head width K.

    Not timed yet: the sizes fill the registers and the 227 KB of shared memory.
    """
    keys = 128 if K <= 128 else 64
    if rows > 64:
        return HopperForwardTiles(1, 2, keys, 2, 232, 40)
    if K <= 128:
        return HopperForwardTiles(2, 1, 64, 2, 208, 40)
    return HopperForwardTiles(1, 1, keys, 2, 240, 40)
