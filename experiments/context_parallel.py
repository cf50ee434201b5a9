"""Bookmark attention of one row over 1, 2, 4, .. devices of a host: transports, scaling, and how much they send.

    python -m experiments.context_parallel [--tokens=524288,1048576] [--transports=exchange,ring] [--repeats=20]

All-gather is an exchange with room for everything. Efficiency is the time on one device over devices times theirs, at
the same number of tokens. `bytes_over_union`: blocks sent over blocks that somebody listed, of a forward pass. Rows
measured before on the same device stay; context_parallel.png has them all.
"""

import functools
import itertools
import pathlib
import statistics
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, NamedSharding
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.parallel import attend, exchange
from bsa.parallel import mesh as meshes
from bsa.train import provenance
from experiments import record
from pallas_kernels import selection

CELL = ("device", "devices", "tokens", "transport", "pass")

_TOKENS = flags.DEFINE_list("tokens", ["524288", "1048576"], "Lengths of the row.")
_TRANSPORTS = flags.DEFINE_list(
    "transports", ["exchange", "ring", "all-gather"], "Of rows on several devices."
)
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls; the median counts.")
_CAPACITY = flags.DEFINE_integer(
    "capacity", 0, "Blocks of a round of exchange; 0: few more than anybody wants."
)

H, G, K, C, J = 32, 8, 128, 16, 64
WINDOW_BLOCKS = 16


def make_lists(T: int) -> selection.BlockSelection:
    """A window, the sink, and choices among the last eighth of the row and a few popular blocks, as trained layers make.

    All lists but the first few are about full, so that equal shares of the row are equal work.
    """
    num = T // C
    rng = np.random.default_rng(0)
    own = np.arange(num)[:, None]
    window = own - np.arange(WINDOW_BLOCKS)
    reach = np.clip(own - WINDOW_BLOCKS, 1, num // 8)
    near = own - WINDOW_BLOCKS - (rng.random((num, J // 2)) * reach).astype(int)
    popular = np.sort(rng.choice(num, num // 16, replace=False))
    far = rng.random((num, J - 1 - WINDOW_BLOCKS - J // 2))
    far = popular[(far * np.searchsorted(popular, own)).astype(int)]
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


def room_for_all(lists, devices: int) -> int:
    """Blocks of a round that takes all that anybody wants, in steps of 256."""
    wanted = int(exchange.count_blocks(lists, devices).max())
    return -(-(wanted + 1) // 256) * 256


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


class Call:
    """One length, number of devices and transport: its arrays' shapes, and both passes, compiled."""

    def __init__(self, T: int, devices: int, transport: str, lists):
        self._lists, self._transport = lists, transport
        self._capacity = 0
        if transport == "exchange":
            self._capacity = _CAPACITY.value or room_for_all(lists, devices)
        self.name = {
            "device": jax.devices()[0].device_kind,
            "devices": devices,
            "tokens": T,
            "transport": transport,
            "capacity_blocks": self._capacity,
        }
        self._mesh = jax.make_mesh(
            (1, 1, devices, 1),
            meshes.MESH_AXES,
            axis_types=(AxisType.Auto,) * 4,
            devices=jax.devices()[:devices],
        )
        kind = "ring" if transport == "ring" else "exchange"
        self._attend = functools.partial(
            attend.block_sparse_attention,
            placement=meshes.Placement(self._mesh, kind, self._capacity),
            scale=K**-0.5,
            implementation="auto",
        )

    def shapes(self):
        """Of q, k, v, the lists and the segments, without arrays; each device has its part, as `select` leaves it."""
        T = self.name["tokens"]

        def part(axes, shape, dtype):
            spec = NamedSharding(self._mesh, meshes.activation_spec(axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

        def heads(axes, num):
            return part(axes, (1, T, num, K), jnp.bfloat16)

        lists = jax.tree.map(
            lambda x: part("BGQJ"[: x.ndim], x.shape, x.dtype), self._lists
        )
        segment = jax.ShapeDtypeStruct(
            (1, T), jnp.int32, sharding=meshes.batch_sharding(self._mesh)
        )
        key = heads("BSGK", G)
        return heads("BTHK", H), key, key, lists, segment

    def compile(self):
        """Compiles what `measure` times; several calls may do so at once."""

        def loss(q, k, v, lists, segment):
            out = self._attend(q, k, v, lists, segment)
            return jnp.square(out.astype(jnp.float32)).mean()

        passes = {
            "forward": self._attend,
            "forward+backward": jax.grad(loss, argnums=(0, 1, 2)),
        }
        self._passes = {
            name: jax.jit(function).lower(*self.shapes()).compile()
            for name, function in passes.items()
        }
        return self

    def measure(self):
        """Rows of both passes."""
        *shapes, lists, segment = self.shapes()
        arrays = [
            jax.jit(
                functools.partial(jax.random.normal, shape=x.shape, dtype=x.dtype),
                out_shardings=x.sharding,
            )(jax.random.key(number))
            for number, x in enumerate(shapes)
        ]
        arrays += [
            jax.tree.map(
                lambda x, y: jax.device_put(x, y.sharding), self._lists, lists
            ),
            jax.device_put(jnp.zeros(segment.shape, segment.dtype), segment.sharding),
        ]
        sent = share_sent(
            self._lists, self.name["devices"], self._transport, self._capacity
        )
        for name, function in self._passes.items():
            ms = time_ms(function, *arrays)
            yield self.name | {"pass": name, "ms": ms, "bytes_over_union": sent}


def time_ms(function, *arguments) -> float:
    """Median time of a call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def main(argv: list[str]) -> None:
    """Compiles all, measures one after another, prints and records."""
    del argv
    several = [2**i for i in range(1, jax.device_count().bit_length())]
    settings = [(1, "exchange"), *itertools.product(several, _TRANSPORTS.value)]
    calls = []
    for T in map(int, _TOKENS.value):
        lists = make_lists(T)
        calls += [Call(T, *setting, lists) for setting in settings]
    with futures.ThreadPoolExecutor() as pool:
        calls = list(pool.map(Call.compile, calls))
    origin, alone = provenance.provenance(), {}
    for call in calls:
        for row in call.measure():
            key = row["tokens"], row["pass"]
            alone.setdefault(key, row["ms"])
            row["efficiency"] = alone[key] / (row["devices"] * row["ms"])
            print(row, flush=True)
            record.merge("context_parallel", origin, row, CELL)
    draw(
        record.read("context_parallel")["records"],
        record.RESULTS / "context_parallel.png",
    )


def draw(records: list[dict], path: pathlib.Path) -> None:
    """Efficiency of both passes: a bar for each transport and length on several devices."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = [row for row in records if row["devices"] > 1]
    passes = list(dict.fromkeys(row["pass"] for row in rows))

    def label(row):
        return (
            f"{row['transport']}\n{row['tokens']:,}\n{row['devices']} x {row['device']}"
        )

    labels = list(dict.fromkeys(map(label, rows)))
    for turn, name in enumerate(passes):
        mine = [row for row in rows if row["pass"] == name]
        places = [labels.index(label(row)) + 0.4 * (turn - 0.5) for row in mine]
        axes.bar(places, [row["efficiency"] for row in mine], 0.4, label=name)
    axes.set_xticks(range(len(labels)), labels, fontsize="x-small")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_ylabel("time on one device over all devices' time")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main)
