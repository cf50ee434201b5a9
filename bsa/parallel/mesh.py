"""Devices to a mesh, and the one table that says which axis of which array is split.

`bsa/main.py` joins the processes of a cluster, makes the mesh and hands it to
`bsa/train`, which asks here for the sharding of every array it owns.
"""

import dataclasses

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import shapes

MESH_AXES = ("data", "fsdp")
# Rows (B) are split over all devices: fsdp devices hold different rows, too.
ROW_AXES = ("data", "fsdp")
# Axis letter of a parameter to the mesh axis that splits it; other letters are whole
# on every device. The model width stands in every matrix, and is a power of two.
PARAMETER_AXES = {"D": "fsdp"}


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; -1 for one of them means all that are left.

    Raises:
        ValueError: an axis is 0 or less than -1, or more than one is -1.
    """

    data: int
    fsdp: int

    def __post_init__(self):
        sizes = (self.data, self.fsdp)
        if (
            any(size < -1 or size == 0 for size in sizes)
            or self.data == self.fsdp == -1
        ):
            raise ValueError(
                f"mesh: data={self.data}, fsdp={self.fsdp}; "
                "sizes are positive, and at most one is -1"
            )


def initialize_distributed() -> None:
    """Joins the processes of a cluster; does nothing on a machine that is not in one.

    To be called before anything else of JAX. The cluster is what JAX detects: Cloud
    TPU, Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS and its companions.

    Raises:
        RuntimeError: JAX has been used already, or the other processes do not answer.
        ValueError: the cluster is described in part only.
    """
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        logging.info("No cluster found: a run of one process.")


def make_mesh(settings: MeshSettings, devices=None) -> Mesh:
    """The mesh with axes "data" and "fsdp", both left to the compiler (`AxisType.Auto`).

    Args:
        settings: devices along each axis.
        devices: what to use; None means all devices of all processes.
    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [settings.data, settings.fsdp]
    if -1 in sizes:
        free = sizes.index(-1)
        sizes[free] = max(len(devices) // sizes[1 - free], 1)
    data, fsdp = sizes
    if data * fsdp != len(devices):
        raise ValueError(
            f"mesh: data={data} times fsdp={fsdp} is {data * fsdp} devices, but there "
            f"are {len(devices)}; data=-1, fsdp=1 always works"
        )
    return jax.make_mesh(
        (data, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def state_sharding(mesh: Mesh, tree):
    """Where each array of a train state lives, read off the last name of its path.

    A name ends in its axes (`query_DHK`), and moments of the optimiser carry the name of
    their parameter, so both are split alike. One leading axis more than the name says
    is the layers', and whole. Vectors, leaves without axes in their names, and axes
    that the devices do not divide evenly are whole on every device.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
    Returns:
        The same tree of `NamedSharding`s.
    Raises:
        ValueError: an array's rank is neither that of its name nor one more.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path, leaf.shape)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices; further axes whole."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def global_batch(mesh: Mesh, batch):
    """This process's rows to global arrays, each device holding its share of rows.

    Args:
        batch: a tree of NumPy arrays whose first axis is this process's rows; every
            process brings equally many.
    Raises:
        ValueError: the rows do not divide evenly over the devices.
    """
    rows = jax.tree.leaves(batch)[0].shape[0] * jax.process_count()
    if rows % mesh.size:
        raise ValueError(
            f"B={rows} rows do not divide over {mesh.size} devices; "
            f"B={-(-rows // mesh.size) * mesh.size} would"
        )
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch
    )


def _spec(mesh, path, shape):
    """The axes of one leaf, by `PARAMETER_AXES`."""
    name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
    _, underscore, axes = name.rpartition("_")
    if not underscore or not axes or set(axes) - set(shapes.ALPHABET):
        return PartitionSpec()
    if len(shape) - len(axes) not in (0, 1):
        raise ValueError(f"{name} has shape {tuple(shape)}, not the axes {axes}")
    if len(axes) == 1:
        return PartitionSpec()
    parts = [None] * (len(shape) - len(axes))
    for letter, size in zip(axes, shape[len(parts) :]):
        axis = PARAMETER_AXES.get(letter)
        fits = axis is not None and axis not in parts and size % mesh.shape[axis] == 0
        parts.append(axis if fits else None)
    return PartitionSpec(*parts)
