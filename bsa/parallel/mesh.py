"""Devices to a mesh, and the one table that says which axis of which array is split over which mesh axis."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; -1 for one of them means all that are left.

    Raises:
        ValueError: an axis is 0 or less than -1, or more than one is -1.
    """

    data: int
    fsdp: int

    def __post_init__(self):
        if any(size < -1 or size == 0 for size in (self.data, self.fsdp)) or self.data == self.fsdp == -1:
            raise ValueError(f"mesh: data={self.data}, fsdp={self.fsdp}; sizes are positive, and at most one is -1")
