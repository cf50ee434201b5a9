"""Reading 128K to 10M tokens and answering: prefill rate, time a token, bytes, against dense attention on the same cache.

Command: python -m experiments.decode [--tokens=131072,1048576,10485760] [--kinds=bookmark,dense] [--pattern=wwwb]
Hardware: one H100; the records say which
Output: experiments/results/decode.json and .png; cells measured before on the same device stay

A model of D=512, L=8, H=8, G=2 with fresh parameters reads random bytes. `dense` has dense layers in place of bookmark
layers; its cache is taken as read, since reading it would take tokens squared, and its prefill is not measured. One row is
read, `--piece` tokens at once; all of `--batch` rows get a copy of its cache. `ms_per_token` is the median over calls, each of `--tokens_a_call`
tokens of every row, of the time of one of these tokens. `formula_bytes` is what the cache's settings promise and the
parameters; `peak_bytes` is the allocator's, or null where it does not say. Each cell runs in a process of its own.
"""

import argparse
import dataclasses
import json
import operator
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.decode import cache as caches
from bsa.decode import generate, step
from bsa.decode import settings as decode_settings
from bsa.model import decoder
from bsa.train import provenance, settings
from configs import base
from experiments import record

COARSEST = 2048
"""Levels are added until there are at most this many of the coarsest chapters, all of which a query is compared with."""


def long_index(index, tokens, route):
    """The index of a model, routed for a long text: in bfloat16, chapters of 32, as many levels as the text asks for."""
    num, levels = tokens // index.C // 32, 1
    while num > COARSEST:
        num, levels = num // 32, levels + 1
    return dataclasses.replace(
        index,
        route=route,
        store="bfloat16",
        chapter_bookmarks=32,
        chapter_levels=levels,
        chapter_R=8,
        P=8 if route == "graph" else 0,
        children=16,
    )


def model_settings(tokens, arguments, kind):
    """The measured model."""
    config = base.get_config()
    pattern = arguments.pattern
    config.index.J = 64  # as it was when rates were first measured
    config.model.update(D=512, H=8, G=2, K=64, F=1408, L=8, remat="none")
    if arguments.small:
        config.model.update(D=32, H=4, G=2, K=8, F=64, L=len(pattern), dtype="float32")
    config.model.update(
        pattern=pattern.replace("b", "d") if kind == "dense" else pattern,
        positions="r" * len(pattern),
        window_tokens=(256,) * len(pattern),
    )
    model = settings.from_config(config).model
    index = long_index(model.index, tokens, arguments.route)
    return dataclasses.replace(model, index=index)


def measure(tokens, kind, arguments):
    """The record of one cell."""
    model = model_settings(tokens, arguments, kind)
    room = decode_settings.CacheSettings(
        tokens + arguments.steps + 1, arguments.piece, arguments.store
    )
    params = decoder.init(jax.random.key(0), model)
    model = model.read_by(arguments.granularity)
    cache = caches.empty(model, room, 1)
    random, rate = np.random.default_rng(tokens), None
    if kind == "dense":
        cache = dataclasses.replace(cache, length_B=jnp.full(1, tokens, jnp.int32))
    else:
        token_BT = random.integers(0, 256, (1, tokens), np.int32)
        # The first piece compiles.
        _, cache = step.prefill(params, token_BT[:, : arguments.piece], cache, model)
        jax.block_until_ready(cache)
        begin = time.perf_counter()
        _, cache = step.prefill(params, token_BT[:, arguments.piece :], cache, model)
        jax.block_until_ready(cache)
        rate = token_BT[:, arguments.piece :].size / (time.perf_counter() - begin)
    if arguments.batch > 1:
        cache = jax.tree.map(lambda x: jnp.repeat(x, arguments.batch, axis=0), cache)
    bytes_of_cache, share, times = caches.num_bytes(cache), None, []
    sampling = decode_settings.SamplingSettings(
        max_tokens=arguments.steps, tokens_a_call=arguments.tokens_a_call
    )
    first_B = np.zeros(arguments.batch, np.int32)
    for drawn in generate.stream(params, first_B, cache, model, sampling):
        times.append(time.perf_counter())
        if kind == "bookmark":
            block_id = next(r for r in drawn.readings if r is not None).block_id_BGJ
            share = float((block_id >= 0).sum(-1).mean()) / (tokens / model.index.C)
    a_call = np.diff(times[:: arguments.tokens_a_call])
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "tokens": tokens,
        "kind": kind,
        "store": arguments.store,
        "pattern": arguments.pattern,
        "route": arguments.route,
        "granularity": arguments.granularity,
        "batch": arguments.batch,
        "piece": arguments.piece if kind == "bookmark" else None,
        "prefill_tokens_per_s": rate,
        "tokens_a_call": arguments.tokens_a_call,
        "ms_per_token": 1000 * float(np.median(a_call[1:])) / arguments.tokens_a_call,
        "share_of_blocks_read": share,
        "cache_bytes": bytes_of_cache,
        "formula_bytes": arguments.batch * formula(model, room)
        + sum(x.nbytes for x in jax.tree.leaves(params)),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def formula(model, room):
    """Bytes of a row's cache, by `cache.bytes_per_token`; what window layers keep is not counted."""
    rows = caches.bytes_per_token(model, room)
    repeated = model.L // len(model.pattern)
    each = sum(row["kv_bytes"] + row["index_bytes"] for row in rows)
    return round(each * repeated * room.capacity_tokens)


def draw(records, path):
    """Milliseconds of a token over rows that answer together, a line for each kind, length, device and way to call."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    axes, lines = figure.subplots(), {}
    for row in sorted(records, key=operator.itemgetter("batch")):
        label = (
            f"{row['kind']}, {row['tokens']:,} tokens, {row['tokens_a_call']} a call, "
            f"{row['store']}, {row['device']}"
        )
        lines.setdefault(label, []).append((row["batch"], row["ms_per_token"]))
    for label, points in lines.items():
        axes.loglog(*zip(*points), ".-", label=label)
    axes.set(xlabel="rows", ylabel="ms a token of every row")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="131072,1048576,10485760")
    parser.add_argument("--kinds", default="bookmark,dense")
    parser.add_argument("--pattern", default="wwwb")
    parser.add_argument("--route", default="chapters", help="flat, chapters or graph")
    parser.add_argument(
        "--granularity", default="token", help="of reading: token or block"
    )
    parser.add_argument("--store", default="model", help="model or int8")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--piece", type=int, default=1024, help="tokens read at once")
    parser.add_argument("--steps", type=int, default=128, help="tokens answered")
    parser.add_argument(
        "--tokens_a_call", type=int, default=16, help="a third of --steps or less"
    )
    parser.add_argument("--small", action="store_true", help="a model for a CPU")
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse()
    sizes = [int(tokens) for tokens in arguments.tokens.split(",")]
    kinds = arguments.kinds.split(",")
    if arguments.cell:
        print(json.dumps(measure(sizes[0], kinds[0], arguments)))
        return
    cells = (
        *("device", "tokens", "kind", "store", "pattern", "route", "batch"),
        *("tokens_a_call", "granularity", "piece"),
    )
    for tokens in sizes:
        for kind in kinds:
            command = [sys.executable, "-m", "experiments.decode", *sys.argv[1:]]
            command += ["--cell", f"--tokens={tokens}", f"--kinds={kind}"]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            print(row, flush=True)
            record.merge("decode", provenance.provenance(), row, cells)
    draw(record.read("decode")["records"], record.RESULTS / "decode.png")


if __name__ == "__main__":
    main()
