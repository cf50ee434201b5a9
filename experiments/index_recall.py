"""What digests and routes find on real queries and keys: mass caught, recall of the flat route, share scored and proven.

Command: python -m experiments.index_recall --keys=PATH.npz [--choices=8] [--beam=8] [--window=64]
    PATH.npz holds q_THK and k_TGK of one layer of any model, query heads in the order of their groups, T a multiple of
    16, times whatever scale is in --scale (1/sqrt(K) if it is not given). With --workdir=runs/tiny and
    --config=configs/tiny.py the file is made first, from the last bookmark layer of a trained run.
Hardware: any
Output: a table, experiments/results/index_recall.json and .png

The graph route hops once, from as many bookmarks as are chosen. Mass is a proxy: a digest that catches more of it can still lose in nats a token.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.index import build, certificate, local, metrics, route
from bsa.index import settings as index_settings
from bsa.model import decoder
from bsa.parallel import mesh as meshes
from bsa.tasks import pipeline, sources
from bsa.train import loop, provenance, settings
from configs import base
from experiments import record

SAMPLED_TOKENS = 256
COLUMNS = (
    "mass_caught",
    "oracle_mass",
    "recall_of_flat",
    "share_scored",
    "share_proven",
    "neighbour_overlap",
)


def main() -> None:
    """Makes the file if asked, measures every combination, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--scale", type=float)
    parser.add_argument("--results", type=pathlib.Path, default=record.RESULTS)
    flags = parser.parse_args()
    if flags.workdir:
        np.savez_compressed(flags.keys, **trained_keys(flags.config, flags.workdir))
    arrays = np.load(flags.keys)
    rows = measure(arrays["q_THK"], arrays["k_TGK"], flags)
    for row in rows:
        name = f"{row['digest']:12} {row['route']:9} {row['similarity'] or '':8}"
        print(name, *(f"{column} {row[column]:.3f}" for column in COLUMNS), sep="  ")
    record.write("index_recall", provenance.provenance(), rows, flags.results)
    draw(rows, flags.results / "index_recall.png")


def trained(config: str, workdir: pathlib.Path) -> tuple[settings.RunSettings, dict]:
    """The run that a file of configs/ describes, and its newest parameters."""
    spec = importlib.util.spec_from_file_location("config", config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = settings.from_config(module.get_config())
    mesh = meshes.make_mesh(run.mesh)
    params, _ = loop.restore_params(run, mesh, workdir.absolute())
    return run, params


def trained_keys(config: str, workdir: pathlib.Path) -> dict:
    """q_THK and k_TGK, float16, of the last bookmark layer on the first held-out row, and text_T, its bytes."""
    run, params = trained(config, workdir)
    corpus = sources.open_corpus(run.data)
    batch = next(iter(pipeline.heldout_batches(corpus, run.data, 1)))
    inputs = (batch[name][:1] for name in ("token_BT", "segment_id_BT", "position_BT"))
    layers = decoder.queries_and_keys(params, *inputs, run.model)
    q, k = layers[max(name for name in layers if name.endswith("b"))]
    return {
        "q_THK": np.asarray(q[-1, 0], np.float16),
        "k_TGK": np.asarray(k[-1, 0], np.float16),
        "text_T": np.asarray(batch["token_BT"][0], np.uint8),
    }


def measure(q_THK, k_TGK, flags) -> list[dict]:
    """One record for each digest, route and, where there are links, similarity."""
    q_BTHK, k_BSGK = (jnp.asarray(x, jnp.float32)[None] for x in (q_THK, k_TGK))
    T, _, K = q_THK.shape
    scale = flags.scale or K**-0.5
    default = settings.from_config(base.get_config()).model.index
    position_BT = jnp.arange(T, dtype=jnp.int32)[None]
    view = local.window(
        position_BT,
        window_tokens=flags.window,
        sink_tokens=default.sink_tokens,
        key_block=default.C,
    )
    token_id_T = jnp.unique(
        jnp.linspace(flags.window, T - 1, SAMPLED_TOKENS).astype(jnp.int32)
    )
    mass_BGTN = metrics.block_mass(
        q_BTHK[:, token_id_T],
        k_BSGK,
        token_id_T,
        jnp.zeros((1, token_id_T.size), jnp.int32),
        key_block=default.C,
        scale=scale,
    )
    low_BT, high_BT = (x[:, token_id_T] for x in view.open_blocks)

    @functools.partial(jax.jit, static_argnames="index")
    def choose(index):
        bookmarks = build.build_index(k_BSGK, index)
        found = route.search(q_BTHK, k_BSGK, bookmarks, view, index, scale=scale)
        proven_BGT = certificate.prove(
            q_BTHK[:, token_id_T], bookmarks, (low_BT, high_BT), index, scale=scale
        )
        proven = metrics.share_proven(proven_BGT, low_BT, high_BT)
        links = bookmarks.links
        return *found, proven, 0 if links is None else metrics.most_children(links)

    rows, flat = [], {}
    for digest, (name, similarity) in itertools.product(
        index_settings.DIGESTS, routes()
    ):
        links = {"P": 4, "similarity": similarity} if similarity else {}
        index = dataclasses.replace(
            default,
            digest=digest,
            route=name,
            A=flags.choices,
            beam=flags.beam,
            frontier=flags.choices,
            hops=1,
            **links,
        )
        choice_BGTA, scored_BGT, proven, in_degree = choose(index=index)
        flat.setdefault(digest, choice_BGTA)
        caught, oracle, open_share = metrics.mass_caught(
            mass_BGTN, choice_BGTA[:, :, token_id_T], low_BT, high_BT
        )
        rows.append(
            {
                "digest": digest,
                "route": name,
                "similarity": similarity,
                "tokens": T,
                "choices": flags.choices,
                "beam": flags.beam,
                "mass_caught": float(caught),
                "oracle_mass": float(oracle),
                "open_share": float(open_share),
                "recall_of_flat": float(metrics.recall(choice_BGTA, flat[digest])),
                "share_scored": float(metrics.share_scored(scored_BGT, view)),
                "share_proven": float(proven),
                "neighbour_overlap": float(metrics.neighbour_overlap(choice_BGTA)),
                "most_children": int(in_degree),
            }
        )
    return rows


def routes():
    """(route, similarity of its links): flat first, which the others are compared with."""
    linked = (("graph", similarity) for similarity in index_settings.SIMILARITIES)
    return [("flat", None), ("chapters", None), *linked]


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Mass caught over the share scored, a mark for each combination."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.subplots()
    for digest in dict.fromkeys(row["digest"] for row in rows):
        mine = sorted(
            (row["share_scored"], row["mass_caught"])
            for row in rows
            if row["digest"] == digest
        )
        axes.plot(*zip(*mine), "o-", label=digest)
    axes.axhline(
        rows[0]["oracle_mass"],
        color="grey",
        linestyle=":",
        label="best choice of as many",
    )
    axes.set(
        xlabel="bookmarks and chapters scored, per open bookmark",
        ylabel="mass caught of what lies on open blocks",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
