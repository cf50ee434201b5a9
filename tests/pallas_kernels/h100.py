"""An H100 to compile for on a machine that has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks a card about itself; `core_count` and the memories are an SXM5 H100's."""


def mesh():
    """A mesh of one such card; skips the test if JAX's CUDA plugin isn't installed."""
    try:
        topology = topologies.get_topology_desc(
            topology_name="", platform="cuda", target_config=TARGET, topology="1x1x1"
        )
    except NotImplementedError as error:
        pytest.skip(f"needs jax-cuda13-plugin and nvidia-cuda-nvcc: {error}")
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
        return jax.jit(function).lower(*arrays).compile()
