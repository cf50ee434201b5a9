"""Bookmark attention of one row over 1, 2, 4, .. devices of a host: transports, scaling, and how much they send.

    python -m experiments.context_parallel [--tokens=524288,1048576] [--repeats=20]

All-gather is an exchange with room for everything. Efficiency is the time on one device over devices times theirs, at
the same number of tokens. `bytes_over_union`: blocks sent over blocks that somebody listed, of a forward pass.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, NamedSharding

from bsa.parallel import attend, exchange
from bsa.parallel import mesh as meshes
from bsa.train import provenance
from experiments import record
from pallas_kernels import selection

_TOKENS = flags.DEFINE_list("tokens", ["524288", "1048576"], "Lengths of the row.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls; the median counts.")
_CAPACITY = flags.DEFINE_integer("capacity", 2048, "Blocks of a round of exchange.")

H, G, K, C, J = 32, 8, 128, 16, 64
WINDOW_BLOCKS = 16


def make_lists(T: int) -> selection.BlockSelection:
    """A window, the sink, and choices among the last eighth of the row and a few popular blocks, as trained layers make."""
    num = T // C
    rng = np.random.default_rng(0)
    own = np.arange(num)[:, None]
    window = own - np.arange(WINDOW_BLOCKS)
    near = own - WINDOW_BLOCKS - rng.integers(0, num // 8, (num, J // 2))
    popular = rng.choice(num, num // 16, replace=False)
    far = rng.choice(popular, (num, J - 1 - WINDOW_BLOCKS - J // 2))
    block_id = np.concatenate([np.zeros_like(own), window, near, far], axis=1)
    block_id = np.sort(
        np.where((block_id < 0) | (block_id > own), -1, block_id), axis=1
    )
    block_id[:, 1:][block_id[:, 1:] == block_id[:, :-1]] = -1
    order = np.argsort(block_id < 0, axis=1, kind="stable")
    block_id = np.take_along_axis(block_id, order, axis=1)
    block_id = jnp.broadcast_to(jnp.asarray(block_id, jnp.int32), (1, G, num, J))
    count = (block_id >= 0).sum(-1, dtype=jnp.int32)
    mask = jnp.full(block_id.shape, 2**C - 1, jnp.uint32)
    return selection.BlockSelection(block_id, count, mask, C, C)


def share_sent(lists, devices: int, transport: str, capacity: int) -> float | None:
    """Blocks sent over blocks wanted; None where nothing is wanted of others."""
    wanted = np.asarray(exchange.count_blocks(lists, devices))[0]
    if not wanted.any():
        return None
    blocks = lists.block_id_BGQJ.shape[2] // devices
    pairs = devices * (devices - 1)
    if transport == "ring":
        sent = pairs * blocks
    else:
        capacity = min(capacity or blocks, blocks)
        sent = pairs // 2 * capacity * -(-int(wanted.max()) // capacity)
    return sent * G / int(wanted.sum())


def time_ms(function, *arguments) -> float:
    """Median time of a call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def measure(T: int, devices: int, transport: str, lists) -> list[dict]:
    """Rows of one length, number of devices and transport."""
    capacity = 0 if transport == "all-gather" else _CAPACITY.value
    mesh = jax.make_mesh(
        (1, 1, devices, 1),
        meshes.MESH_AXES,
        axis_types=(AxisType.Auto,) * 4,
        devices=jax.devices()[:devices],
    )
    kind = "ring" if transport == "ring" else "exchange"
    placement = meshes.Placement(mesh, kind, capacity)

    def put(axes, key, heads):
        sharding = NamedSharding(mesh, meshes.activation_spec(axes))
        make = functools.partial(
            jax.random.normal, shape=(1, T, heads, K), dtype=jnp.bfloat16
        )
        return jax.jit(make, out_shardings=sharding)(jax.random.key(key))

    q, k, v = put("BTHK", 0, H), put("BSGK", 1, G), put("BSGK", 2, G)
    segment = jax.device_put(jnp.zeros((1, T), jnp.int32), meshes.batch_sharding(mesh))
    attention = functools.partial(
        attend.block_sparse_attention,
        placement=placement,
        scale=K**-0.5,
        implementation="auto",
    )

    def loss(q, k, v, lists, segment):
        out = attention(q, k, v, lists, segment)
        return jnp.square(out.astype(jnp.float32)).mean()

    passes = {
        "forward": jax.jit(attention),
        "forward+backward": jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
    }
    return [
        {
            "devices": devices,
            "tokens": T,
            "transport": transport,
            "pass": name,
            "ms": time_ms(function, q, k, v, lists, segment),
            "bytes_over_union": share_sent(lists, devices, transport, capacity),
        }
        for name, function in passes.items()
    ]


def main(argv: list[str]) -> None:
    """Measures, prints, records."""
    del argv
    numbers = [2**i for i in range(jax.device_count().bit_length())]
    rows = []
    for T in map(int, _TOKENS.value):
        lists = make_lists(T)
        alone = {}
        for devices in numbers:
            for transport in ("exchange", "ring", "all-gather"):
                for row in measure(T, devices, transport, lists):
                    alone.setdefault((transport, row["pass"]), row["ms"])
                    best = alone[transport, row["pass"]]
                    row["efficiency"] = best / (devices * row["ms"])
                    rows.append(row)
                    print(row, flush=True)
    record.write("context_parallel", provenance.provenance(), rows)


if __name__ == "__main__":
    app.run(main)
