"""Devices to a mesh, and the one table that says which axis of which array is split.

`bsa/main.py` joins the processes of a cluster and makes the mesh; `bsa/train` asks here for the sharding of every array
it owns, and hands the model a `Placement`, by which its functions split activations.
"""

import dataclasses
import math
import os

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import shapes

MESH_AXES = ("data", "fsdp", "context", "tensor")
"""Devices of the last axes are nearest to each other, and talk most."""

HEARTBEAT_S = 60
"""Silence after which a process counts as dead. Its thread beats on while Python compiles or waits."""

TRANSPORTS = ("exchange", "ring")

PARAMETER_AXES = {
    **dict.fromkeys("HGFV", ("tensor",)),
    "D": ("fsdp", "context"),
}
"""Axis letter of a parameter to the mesh axes that split it; other letters are whole on every device.

The model width stands in every matrix, and is a power of two. Devices of one row's context would hold copies of the
parameters, so they share them like those of fsdp.
"""

ACTIVATION_AXES = {
    "B": ("data", "fsdp"),
    **dict.fromkeys("TSQ", ("context",)),
    **dict.fromkeys("HG", ("tensor",)),
}
"""The same for batches and activations: fsdp devices hold different rows, too."""


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; -1 for one of them means all that are left.

    `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: an axis is 0 or less than -1, more than one is -1, or the transport is not known.
    """

    data: int
    fsdp: int
    context: int
    tensor: int
    transport: str
    capacity_blocks: int

    def __post_init__(self):
        sizes = _sizes(self)
        if any(size < -1 or size == 0 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh: {_describe(sizes)}; sizes are positive, and at most one is -1"
            )
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"mesh: transport={self.transport!r} is not one of {', '.join(TRANSPORTS)}"
            )
        if self.capacity_blocks < 0:
            raise ValueError(
                f"mesh: capacity_blocks={self.capacity_blocks} cannot be negative; 0 is a whole shard"
            )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the model's functions run: on a mesh, or (`mesh=None`) on one device.

    Attributes:
        transport: how keys and values reach the queries of other devices: "exchange" or "ring".
        capacity_blocks: key blocks that a device gets from each other one in a round of exchange; 0: all it has.
    """

    mesh: Mesh | None
    transport: str = "exchange"
    capacity_blocks: int = 0

    @property
    def context(self) -> int:
        """Devices that share a row."""
        return 1 if self.mesh is None else self.mesh.shape["context"]

    @property
    def is_split(self) -> bool:
        """Whether there is more than one device."""
        return self.mesh is not None and self.mesh.size > 1

    def constrain(self, x, axes: str):
        """Splits an activation as the table says; changes no value."""
        if not self.is_split:
            return x
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, activation_spec(axes))
        )

    def run_on_shards(self, function, *, inputs, outputs):
        """`function` of what each device holds, as a function of whole arrays.

        Args:
            function: not wrapped if there is only one device.
            inputs, outputs: trees of axis letters ("BTHK"), as `jax.shard_map` wants its specs.
        """
        if not self.is_split:
            return function
        in_specs, out_specs = jax.tree.map(activation_spec, (inputs, outputs))
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,  # neither while loops nor kernels say what varies over which axis
        )


ALONE = Placement(None)
"""One device."""


def place(settings: MeshSettings, mesh: Mesh) -> Placement:
    """What the model needs to know of a mesh and its settings."""
    return Placement(mesh, settings.transport, settings.capacity_blocks)


def initialize_distributed() -> None:
    """Joins the processes of a cluster; does nothing on a machine that is not in one.

    To be called before anything else of JAX. The cluster is what JAX detects (Cloud TPU, Slurm, Open MPI, Kubernetes),
    or what JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; the last two are read here. If a process
    dies, the others end with an error as soon as they miss it, after `HEARTBEAT_S` at the latest.

    Raises:
        RuntimeError: JAX has been used already, or the other processes do not answer.
        ValueError: the cluster is described in part only.
    """
    numbers = (
        os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")
    )
    num_processes, process_id = (number and int(number) for number in numbers)
    try:
        jax.distributed.initialize(
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        logging.info("No cluster found: a run of one process.")


def make_mesh(settings: MeshSettings, devices=None) -> Mesh:
    """The mesh with `MESH_AXES`, all left to the compiler (`AxisType.Auto`).

    Args:
        settings: devices along each axis.
        devices: what to use; None means all devices of all processes.
    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(settings)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: {_describe(sizes)} is {math.prod(sizes)} devices, but there are {len(devices)}; "
            "data=-1 and 1 for the others always works"
        )
    return jax.make_mesh(
        tuple(sizes),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
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
        lambda path, leaf: NamedSharding(mesh, _parameter_spec(mesh, path, leaf.shape)),
        tree,
    )


def activation_spec(axes: str) -> PartitionSpec:
    """How an activation with these axes is split, by `ACTIVATION_AXES`; a digit is an axis that is whole."""
    return PartitionSpec(*(ACTIVATION_AXES.get(letter) for letter in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, their tokens over context."""
    return NamedSharding(mesh, activation_spec("BT"))


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device, for what every process wants to read."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(mesh: Mesh, num_rows: int) -> None:
    """Raises ValueError unless rows divide evenly over the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if num_rows % devices:
        raise ValueError(
            f"B={num_rows} rows do not divide over {devices} devices; B={-(-num_rows // devices) * devices} would"
        )


def global_batch(mesh: Mesh, batch):
    """The batch, which every process has made alike, to global arrays: each device gets its rows and its tokens of them.

    Args:
        batch: a tree of NumPy arrays with axes BT.
    Raises:
        ValueError: rows or tokens do not divide evenly over the devices.
    """
    B, T = jax.tree.leaves(batch)[0].shape
    check_rows(mesh, B)
    if T % mesh.shape["context"]:
        raise ValueError(
            f"T={T} tokens do not divide over context={mesh.shape['context']} devices"
        )
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            leaf.shape, sharding, leaf.__getitem__
        ),
        batch,
    )


def _sizes(settings):
    """As asked for, in the order of `MESH_AXES`."""
    return [settings.data, settings.fsdp, settings.context, settings.tensor]


def _describe(sizes):
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))


def _parameter_spec(mesh, path, shape):
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
        split = PARAMETER_AXES.get(letter)
        fits = split is not None and split not in parts
        fits = fits and size % math.prod(mesh.shape[axis] for axis in split) == 0
        parts.append(split if fits else None)
    return PartitionSpec(*parts)
