"""What links and chapters find of the flat route's choice on a million clustered keys.

Command: python -m experiments.index_clustered [--tokens=1048576] [--asked=2048]
Hardware: any; minutes on two CPU cores
Output: a table, experiments/results/index_clustered.json and .png

Keys and queries are those of `experiments.index_scaling`. Each row is a way to search: chapters that hold a digest of all
their members, or, as `first member`, the first bookmark's digest alone; with links or without; a beam of so many chapters.
`recall` is the share of the eight blocks of the flat route, on the last tokens of the text; `scored` counts the bookmarks
and chapters that a query was compared with, in hundredths of all bookmarks open to it.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.index import build, chapter, local, metrics, precision, route
from bsa.train import provenance
from experiments import index_scaling, record

BEAMS = (4, 8, 16, 32)


def measure(tokens: int, asked: int):
    """Yields a record for each way to search."""
    flat = index_scaling.settings_for("flat", tokens)
    scale = index_scaling.K**-0.5
    stride = tokens // (4 * asked)
    token_id_T = np.arange(stride - 1, tokens, stride)
    q_BTHK, k_BSGK = index_scaling.clustered(tokens, flat.C, token_id_T)
    view = local.window(
        jnp.arange(tokens, dtype=jnp.int32)[None],
        window_tokens=256,
        sink_tokens=flat.sink_tokens,
        key_block=flat.C,
    )
    q_BTHK, token_id_T = q_BTHK[:, -asked:], token_id_T[-asked:]
    view = jax.tree.map(lambda x: x[:, token_id_T], view)
    search = jax.jit(
        functools.partial(route.search, scale=scale), static_argnames="index"
    )
    make = jax.jit(build.build_index, static_argnums=1)
    wanted, _ = search(q_BTHK, k_BSGK, make(k_BSGK, flat), view, index=flat)
    bookmarks = make(k_BSGK, index_scaling.settings_for("graph", tokens))
    for held in ("all members", "first member"):
        if held == "first member":
            bookmarks = first_members(bookmarks)
        for name in ("chapters", "graph"):
            for beam in BEAMS:
                index = index_scaling.settings_for(name, tokens)
                index = dataclasses.replace(index, beam=beam)
                choice, scored = search(q_BTHK, k_BSGK, bookmarks, view, index=index)
                yield {
                    "tokens": tokens,
                    "chapters": held,
                    "route": name,
                    "beam": beam,
                    "asked": asked,
                    "recall": float(metrics.recall(choice, wanted)),
                    "scored": float(metrics.share_scored(scored, view)),
                }


def first_members(bookmarks: build.BookmarkIndex) -> build.BookmarkIndex:
    """The same index, but a chapter knows only what its first bookmark does; links stay as they are."""
    levels, (point, log_count) = [], precision.unpack(*bookmarks.nodes[0])
    for level in bookmarks.chapters:
        num = level.point_BGERK.shape[2]
        step = point.shape[2] // num
        point = point[:, :, : num * step : step]
        log_count = log_count[:, :, : num * step : step]
        levels.append(chapter.Chapters(point, log_count, None))
    return dataclasses.replace(bookmarks, chapters=tuple(levels))


def draw(records, path):
    """Recall over what was scored, a line for each way to search."""
    figure = Figure(figsize=(5, 4))
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in dict.fromkeys((r["route"], r["chapters"]) for r in records):
        rows = [r for r in records if (r["route"], r["chapters"]) == kind]
        axes.plot(
            [100 * r["scored"] for r in rows],
            [r["recall"] for r in rows],
            marker="o",
            label=f"{kind[0]}, {kind[1]}",
        )
    axes.set_xlabel("% of bookmarks scored")
    axes.set_ylabel("recall of the flat route's 8 blocks")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1048576)
    parser.add_argument("--asked", type=int, default=2048)
    arguments = parser.parse_args()
    records = []
    for row in measure(arguments.tokens, arguments.asked):
        records.append(row)
        print(
            f"{row['route']:9} {row['chapters']:13} beam {row['beam']:2}  "
            f"recall {row['recall']:.3f}  scored {row['scored']:.2%}",
            flush=True,
        )
    record.write("index_clustered", provenance.provenance(), records)
    draw(records, record.RESULTS / "index_clustered.png")


if __name__ == "__main__":
    main()
