"""What a listed tile costs on a TPU: FLOPs and bytes as XLA counts them, and the time that they need at best.

Command: JAX_PLATFORMS=cpu python -m experiments.tpu_roofline
Hardware: none but an x86 CPU, and the libtpu of `jax[tpu]`, which compiles for chips that aren't there

A tile is 128 keys that one query block (its tokens times the heads of a group) reads. Its FLOPs and the bytes that it
fetches (padding of the memory layout included) are those of the compiled arithmetic of one tile; the VMEM is that of the
kernel itself. Bandwidth and rate are JAX's published figures of the chip (`pltpu.get_tpu_info_for_chip`), a TensorCore's
where it is a device of its own. The times are lower bounds, not measurements: no kernel has run on a TPU.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from bsa.train import provenance
from experiments import record
from pallas_kernels import BlockSelection, block_sparse_attention

CHIPS = {
    "v5e": ("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1),
    "v5p": ("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2),
    "v6e": ("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1),
    "tpu7x": ("tpu7x:2x2x1", pltpu.ChipVersion.TPU_7X, 1),
}
"""Topology, JAX's name of the chip, and TensorCores that share a device."""
SHAPES = ((16, 16, 4), (16, 16, 16), (128, 128, 4))
"""Tokens of a query block and of a key block, and query heads of a group."""
K = 128
TILE_KEYS = 128
KERNELS = ("forward", "dq", "dkv")


def make_mesh(topology):
    """A mesh of one chip that isn't there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return jax.sharding.Mesh(
        np.array(devices.devices[:1]), "x", axis_types=(jax.sharding.AxisType.Auto,)
    )


def compile_for(mesh, function, *arrays):
    """Compiles a function of what looks like arrays."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*arrays)
    # Compiles faster, and reports the same; unknown to older JAX.
    fast = {"optimization_level": "O1"} if jax.__version_info__ >= (0, 12) else None
    return lowered.compile(compiler_options=fast)


def dot(x, y, x_axis, y_axis):
    """A matrix product as the kernels make it."""
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def forward_tile(own, fetched):
    """Queries of a block against a tile of keys and values."""
    (q,), (k, v) = own, fetched
    p = jnp.exp(dot(k, q, 1, 1))
    return dot(v, p.astype(q.dtype), 0, 0), p.sum(axis=0)


def dq_tile(own, fetched):
    """The gradient of a block's queries."""
    (q, dout, stats), (k, v) = own, fetched
    p = jnp.exp(dot(k, q, 1, 1) - stats[0])
    ds = p * (dot(v, dout, 1, 1) - stats[1])
    return dot(k, ds.astype(q.dtype), 0, 0)


def dkv_tile(own, fetched):
    """The gradients of a tile's keys and values, of each key block for itself."""

    def of_block(k, v, q, dout, stats):
        p = jnp.exp(dot(k, q, 1, 1) - stats[0])
        ds = p * (dot(v, dout, 1, 1) - stats[1])
        return dot(ds.astype(q.dtype), q, 1, 0), dot(p.astype(q.dtype), dout, 1, 0)

    return jax.vmap(of_block)(*own, *fetched)


def tile_of(kernel, query_block, key_block, heads):
    """The arithmetic of a tile, its own operands, and those that it fetches."""
    rows, blocks = query_block * heads, TILE_KEYS // key_block

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    keys = (shape(TILE_KEYS, K), shape(TILE_KEYS, K))
    queries = (shape(rows, K), shape(rows, K), shape(2, rows, dtype=jnp.float32))
    if kernel == "forward":
        return forward_tile, queries[:1], keys
    if kernel == "dq":
        return dq_tile, queries, keys
    own = (shape(blocks, key_block, K), shape(blocks, key_block, K))
    readers = jax.tree.map(lambda x: shape(blocks, *x.shape, dtype=x.dtype), queries)
    return dkv_tile, own, readers


def kernel_vmem(mesh, query_block, key_block, heads):
    """VMEM of each kernel, bytes, as its compiler reports it."""
    T, G, J = 2048, 2, 2 * TILE_KEYS // key_block
    lists = (1, G, T // query_block)

    def run(q_BTHK, k_BSGK, block_id_BGQJ, count_BGQ):
        lists = BlockSelection(block_id_BGQJ, count_BGQ, None, query_block, key_block)

        def attend(q_BTHK, k_BSGK):
            return block_sparse_attention(
                q_BTHK, k_BSGK, k_BSGK, lists, scale=1.0, implementation="mosaic_tpu"
            )[0]

        out_BTHK, pull = jax.vjp(attend, q_BTHK, k_BSGK)
        return pull(out_BTHK)

    compiled = compile_for(
        mesh,
        run,
        jax.ShapeDtypeStruct((1, T, heads * G, K), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, T, G, K), jnp.bfloat16),
        jax.ShapeDtypeStruct((*lists, J), jnp.int32),
        jax.ShapeDtypeStruct(lists, jnp.int32),
    )
    return {
        re.search(r"bsa_([a-z]+)", line)[1]: int(
            re.search(r'"used_scoped_memory_configs":\[\{.*?"size":"(\d+)"', line)[1]
        )
        for line in compiled.as_text().splitlines()
        if 'custom_call_target="tpu_custom_call"' in line
    }


def measure(generation, shape):
    """A record of each kernel, for one chip and one shape."""
    topology, version, cores = CHIPS[generation]
    info = pltpu.get_tpu_info_for_chip(version, cores)
    mesh = make_mesh(topology)
    vmem = kernel_vmem(mesh, *shape)
    for kernel in KERNELS:
        function, own, fetched = tile_of(kernel, *shape)
        flops = compile_for(mesh, function, own, fetched).cost_analysis()["flops"]
        memory = compile_for(mesh, lambda x: x, fetched).memory_analysis()
        fetched_bytes = memory.argument_size_in_bytes
        memory_ns = 1e9 * fetched_bytes / (cores * info.mem_bw_bytes_per_second)
        matrix_ns = 1e9 * flops / (cores * info.bf16_ops_per_second)
        yield {
            "generation": generation,
            "kernel": kernel,
            "query_block": shape[0],
            "key_block": shape[1],
            "rows": shape[0] * shape[2],
            "flops": flops,
            "bytes": fetched_bytes,
            "flops_per_byte": round(flops / fetched_bytes, 1),
            "memory_ns": round(memory_ns, 1),
            "matrix_ns": round(matrix_ns, 1),
            "bound": "memory" if memory_ns > matrix_ns else "matrix",
            "vmem_bytes": vmem[kernel],
        }


def main() -> None:
    """Prints a row for each record, and writes them."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    records = []
    for generation in CHIPS:
        for shape in SHAPES:
            for row in measure(generation, shape):
                if not records:
                    print(*row, sep="\t")
                print(*row.values(), sep="\t", flush=True)
                records.append(row)
    print(record.write("tpu_roofline", provenance.provenance(), records))


if __name__ == "__main__":
    main()
