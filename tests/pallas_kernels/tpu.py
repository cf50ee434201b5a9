"""TPUs to compile for on a machine that has none: libtpu does it on any x86 CPU."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def mesh(generation):
    """A mesh of one such chip; skips the test if libtpu isn't installed."""
    # Neither look for chips nor for other processes that hold them.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[generation]
        )
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"needs the libtpu of jax[tpu]: {error}")
    devices = np.array(topology.devices[:1])
    return jax.sharding.Mesh(devices, "x", axis_types=(jax.sharding.AxisType.Auto,))


def compile_for(mesh, function, *arrays):
    """Compiles a function of arrays, or of what looks like them, for a mesh of `mesh()`."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=sharding),
        arrays,
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*arrays)
    return lowered.compile(compiler_options=compiler_options())


def compiler_options():
    """Compiles several times faster, and reports the same memory; unknown to older JAX."""
    fast = {"optimization_level": "O1"}
    return fast if jax.__version_info__ >= (0, 12) else None


def kernels(compiled):
    """Name -> bytes of VMEM of each Pallas kernel in a compiled program."""
    found = {}
    for line in compiled.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r"bsa_[a-z]+", line)[0]
            sizes = re.search(
                r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"',
                line,
            )
            found[name] = int(sizes[1])
    return found
