"""How building an index and routing through it grow with the text.

Command: python -m experiments.index_scaling [--tokens=16384,65536] [--routes=flat,chapters-max,graph] [--routed=1024] [--coarsest=2048]
Hardware: any; the records say which
Output: experiments/results/index_scaling.json and .png; lengths and routes measured before on the same device stay

Keys are clustered and come in runs, as topics do; the queries of 64 neighbours are the key of one place anywhere before,
each with noise of its own. Every token could choose 8 blocks of 16 from all that are closed; to save time only `routed`
do, stretches of 128 evenly spread over the text, and `route_ms` is the time that all tokens would take. On a GPU points
are bfloat16, and many tokens must be routed, to fill it, and because what a search prepares of the whole index counts
tokens / `routed` times: 1,048,576. Times are the best of three after compilation. `recall` is the share of the flat
float32 route's blocks that a route finds, and `share_scored` what it compared with, chapters counted as bookmarks, on
the last 256 of the routed tokens.
"""

import argparse
import dataclasses
import functools
import operator
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.index import build, local, metrics, route
from bsa.train import provenance, settings
from configs import base
from experiments import record

K, QUERY_HEADS, RUN_BLOCKS, BLOCKS_PER_TOPIC = 64, 2, 4, 64
STRETCH = 128
"""Consecutive tokens that are routed: a thread block's."""
COARSEST = 2048


def settings_for(route_name, tokens, coarsest=COARSEST):
    """The default index with one route, by best points if its name ends in "-max".

    Levels are added until there are at most `coarsest` of the coarsest chapters, all of which a query is compared with.
    """
    route_name, _, point_pool = route_name.partition("-")
    index = dataclasses.replace(
        settings.from_config(base.get_config()).model.index,
        route=route_name,
        point_pool=point_pool or "logsumexp",
        chapter_bookmarks=32,
        chapter_R=8,
        beam=16,
        P=8 if route_name == "graph" else 0,
        children=16,
        frontier=64,
    )
    num, levels = tokens // index.C // index.chapter_bookmarks, 1
    while num > coarsest:
        num, levels = num // index.chapter_bookmarks, levels + 1
    return dataclasses.replace(index, chapter_levels=levels)


def clustered(tokens, key_block, token_id_T, sharing=1):
    """q_BTHK of some tokens, of which so many neighbours ask for the same place, and k_BSGK."""
    random = np.random.default_rng(tokens)
    num_topics = max(2, tokens // key_block // BLOCKS_PER_TOPIC)
    center = random.normal(size=(num_topics, K)).astype(np.float32)
    run = RUN_BLOCKS * key_block
    topic_S = np.repeat(random.integers(0, num_topics, tokens // run), run)
    noise = random.normal(size=(tokens, K)).astype(np.float32)
    k_SK = center[topic_S] + noise
    first_T = token_id_T // sharing * sharing
    share_T = np.repeat(random.random(-(-len(token_id_T) // sharing)), sharing)
    earlier_T = (first_T * share_T[: len(token_id_T)]).astype(int)
    q_THK = k_SK[earlier_T][:, None] + random.normal(
        size=(len(token_id_T), QUERY_HEADS, K)
    )
    return jnp.asarray(q_THK[None], jnp.float32), jnp.asarray(k_SK[None, :, None])


def stretches(tokens, routed_tokens):
    """int32, the tokens that are routed."""
    end = np.linspace(0, tokens, routed_tokens // STRETCH + 1, dtype=np.int32)[1:]
    return (end[:, None] - np.arange(STRETCH, 0, -1, dtype=np.int32)).reshape(-1)


def timed(function, *arguments):
    """Result and best milliseconds of three, after a first call that compiles."""
    result = jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - begin)
    return result, 1000 * best


def measure(tokens, route_names, routed_tokens, coarsest):
    """Records of one length."""
    flat, token_id_T = settings_for("flat", tokens), stretches(tokens, routed_tokens)
    q_BTHK, k_BSGK = clustered(tokens, flat.C, token_id_T, STRETCH // 2)
    view = local.window(
        jnp.arange(tokens, dtype=jnp.int32)[None],
        window_tokens=256,
        sink_tokens=flat.sink_tokens,
        key_block=flat.C,
    )
    view = jax.tree.map(lambda x: x[:, token_id_T], view)
    late = slice(-min(256, len(token_id_T) // 4), None)

    def pick(x):
        return x[:, late]

    @functools.partial(jax.jit, static_argnames="index")
    def search(q_BTHK, bookmarks, view, index):
        return route.search_blocks(
            q_BTHK,
            None,  # Keys are for the exact step.
            bookmarks,
            view.open_blocks,
            index,
            scale=K**-0.5,
            implementation="auto",
        )

    make = jax.jit(build.build_index, static_argnums=1)
    late_view = jax.tree.map(pick, view)
    unrouted = make(k_BSGK, flat)
    store = "bfloat16" if jax.default_backend() == "gpu" else flat.store
    for name in route_names:
        index = dataclasses.replace(settings_for(name, tokens, coarsest), store=store)
        alike = dataclasses.replace(flat, point_pool=index.point_pool)
        wanted, _ = search(pick(q_BTHK), unrouted, late_view, index=alike)
        bookmarks, build_ms = timed(make, k_BSGK, index)
        routed, route_ms = timed(
            functools.partial(search, index=index), q_BTHK, bookmarks, view
        )
        choice_BGTA, scored_BGT = routed
        yield {
            "device": jax.devices()[0].device_kind,
            "tokens": tokens,
            "route": name,
            "build_ms": round(build_ms, 2),
            "route_ms": round(route_ms * tokens / len(token_id_T), 2),
            "bytes": sum(x.nbytes for x in jax.tree.leaves(bookmarks)),
            "routed_tokens": len(token_id_T),
            "stretch": STRETCH,
            "chapter_bookmarks": index.chapter_bookmarks,
            "levels": len(bookmarks.chapters),
            "share_scored": float(
                metrics.share_scored(scored_BGT[:, :, late], late_view)
            ),
            "recall": float(metrics.recall(choice_BGTA[:, :, late], wanted)),
        }


def slope(records, name):
    """Log-log slope of build + route time over the last tenfold growth that was measured; None if there is none."""
    rows = sorted(
        (r["tokens"], r["build_ms"] + r["route_ms"])
        for r in records
        if r["route"] == name
    )
    rows = [row for row in rows if row[0] * 10 >= rows[-1][0]]
    if len(rows) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(rows)).T, 1)[0])


def draw(records, path):
    """Build + route time against tokens, a line per route and device."""
    figure = Figure(figsize=(5, 4))
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = dict(zip(dict.fromkeys(r["device"] for r in records), ("-", "--", ":")))
    names = dict.fromkeys(r["route"] for r in records)
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for device, style in styles.items():
        for name, color in colors.items():
            rows = [r for r in records if (r["device"], r["route"]) == (device, name)]
            if not rows:
                continue
            rows.sort(key=operator.itemgetter("tokens"))
            value = slope(rows, name)
            label = f"{name}, {device}"
            axes.loglog(
                [r["tokens"] for r in rows],
                [(r["build_ms"] + r["route_ms"]) / 1000 for r in rows],
                marker="o",
                color=color,
                linestyle=style,
                label=label if value is None else f"{label}, slope {value:.2f}",
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds to build and to route every token")
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="16384,65536,131072,262144,524288,1048576")
    parser.add_argument("--routes", default="flat,chapters,graph")
    parser.add_argument("--routed", type=int, default=1024)
    parser.add_argument("--coarsest", type=int, default=COARSEST)
    arguments = parser.parse_args()
    origin, cell = provenance.provenance(), ("device", "tokens", "route")
    routes = arguments.routes.split(",")
    for tokens in map(int, arguments.tokens.split(",")):
        for row in measure(tokens, routes, arguments.routed, arguments.coarsest):
            print(row, flush=True)
            record.merge("index_scaling", origin, row, cell)
    records = record.read("index_scaling")["records"]
    draw(records, record.RESULTS / "index_scaling.png")
    mine = [r for r in records if r["device"] == jax.devices()[0].device_kind]
    for name in routes:
        print(name, "slope of the last tenfold growth:", slope(mine, name))


if __name__ == "__main__":
    main()
