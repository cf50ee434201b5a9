"""What routes find among a trained model's own keys as its text grows to ten million tokens.

Command: python -m experiments.index_text --config=configs/tiny.py --workdir=runs/setmm [--tokens=131072,1048576,10485760]
    The workdir is that of a run with `--config.data.source=setmm`; its documents are read one after another as one text.
Hardware: any; on two shared CPU cores four minutes up to a million tokens, for ten million half an hour and 17 GB without links
Output: a table, experiments/results/index_text.json and .png

Queries and keys are those of the model's first bookmark layer, which has no positions; the layers before it read rows of
ROW tokens, each for itself. `asked` tokens, evenly spread over the text's last eighth, choose 8 blocks of 16 among all
bookmarks before their window. `recall` is the share of the flat route's blocks, `mass_caught` the share of dense attention on
open blocks, `oracle_mass` that of the best 8, `scored` how many bookmarks and chapters a token compared its query with.
Topics of synthetic keys (`experiments.index_scaling`) have nothing in common with each other; those of a text do.
"""

import argparse
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.index import build, local, metrics, route
from bsa.model import decoder
from bsa.tasks import sources
from bsa.train import provenance
from experiments import index_recall, index_scaling, record

ROW = 8192
ROWS = 8
"""That the layers before read at once."""
WINDOW = 256
MASS_TOKENS = 4
"""Whose dense attention is held at once."""
CLUSTERED = {"chapter_by": "cluster", "volume_chapters": 32}
VARIANTS = {
    "flat": {},
    "chapters": {"chapter_levels": 1},
    "chapters-2": {"chapter_levels": 2},
    "chapters-2-beam64": {"chapter_levels": 2, "beam": 64},
    "clusters": {"chapter_levels": 1} | CLUSTERED,
    "clusters-2": {"chapter_levels": 2} | CLUSTERED,
    "graph": {"chapter_levels": 1},
    "graph-2": {"chapter_levels": 2},
}
"""By name, which begins with the route or with `clusters`, for chapters by likeness: how it differs."""


def main() -> None:
    """Measures each length and way to route, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", default="131072,1048576,10485760")
    parser.add_argument("--asked", type=int, default=128)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    flags = parser.parse_args()
    sizes = [int(n) for n in flags.tokens.split(",")]
    q_THK, k_TGK = read_keys(flags.config, flags.workdir, max(sizes))
    origin, cell = provenance.provenance(), ("device", "tokens", "variant")
    for tokens in sizes:
        arrays = q_THK[:tokens], k_TGK[:tokens]
        for row in measure(*arrays, flags.asked, flags.variants.split(",")):
            print(row, flush=True)
            record.merge("index_text", origin, row, cell)
    draw(record.read("index_text")["records"], record.RESULTS / "index_text.png")


def read_keys(config: str, workdir: pathlib.Path, tokens: int):
    """q_THK and k_TGK, float16 on the host, of the corpus's first tokens."""
    run, params = index_recall.trained(config, workdir)
    corpus = sources.open_corpus(dataclasses.replace(run.data, source="setmm"))
    text = bytearray()
    for document, size in enumerate(corpus.sizes):
        if len(text) < tokens:
            text += corpus.read(document, 0, int(size))
    token_NT = np.frombuffer(bytes(text[:tokens]), np.uint8).reshape(-1, ROW)

    @jax.jit
    def compared(token_BT):
        segment_BT = jnp.ones_like(token_BT)
        position_BT = jnp.cumsum(segment_BT, axis=1) - 1
        inputs = params, token_BT, segment_BT, position_BT, run.model
        layers = decoder.queries_and_keys(*inputs)
        arrays = layers[min(name for name in layers if name.endswith("b"))]
        return [x[0].reshape(-1, *x.shape[3:]).astype(jnp.float16) for x in arrays]

    parts = [
        jax.device_get(compared(token_NT[i : i + ROWS].astype(np.int32)))
        for i in range(0, len(token_NT), ROWS)
    ]
    return [np.concatenate(each) for each in zip(*parts)]


def measure(q_THK, k_TGK, asked: int, variants):
    """Yields the record of each way to route through a text."""
    tokens, _, K = q_THK.shape
    token_id_T = np.linspace(tokens * 7 // 8, tokens - 1, asked).astype(np.int32)
    q_BTHK = jnp.asarray(q_THK[token_id_T], jnp.float32)[None]
    k_BSGK = jnp.asarray(k_TGK, jnp.float32)[None]
    flat = index_for("flat", tokens)
    view = local.window(
        jnp.asarray(token_id_T)[None],
        window_tokens=WINDOW,
        sink_tokens=flat.sink_tokens,
        key_block=flat.C,
        place_BT=jnp.asarray(token_id_T)[None],
    )

    @functools.partial(jax.jit, static_argnames="index")
    def search(bookmarks, index):
        return route.search_blocks(
            q_BTHK, None, bookmarks, view.open_blocks, index, scale=K**-0.5
        )

    make = jax.jit(build.build_index, static_argnums=1)
    wanted, _ = search(make(k_BSGK, flat), flat)
    mass_BGTN = block_mass(q_BTHK, k_BSGK, token_id_T, flat.C)
    for name in variants:
        index = index_for(name, tokens)
        bookmarks = make(k_BSGK, index)
        choice_BGTA, scored_BGT = search(bookmarks, index)
        caught, oracle, open_share = metrics.mass_caught(
            mass_BGTN, choice_BGTA, *view.open_blocks
        )
        yield {
            "device": jax.devices()[0].device_kind,
            "tokens": tokens,
            "variant": name,
            "levels": len(bookmarks.chapters),
            "asked": asked,
            "recall": float(metrics.recall(choice_BGTA, wanted)),
            "mass_caught": float(caught),
            "oracle_mass": float(oracle),
            "open_share": float(open_share),
            "scored": float(scored_BGT.mean()),
            "share_scored": float(metrics.share_scored(scored_BGT, view)),
        }


def index_for(variant: str, tokens: int):
    """The index of one way to route."""
    name = variant.partition("-")[0].replace("clusters", "chapters")
    index = index_scaling.settings_for(name, tokens)
    return dataclasses.replace(index, **VARIANTS[variant])


def block_mass(q_BTHK, k_BSGK, token_id_T, key_block: int):
    """`metrics.block_mass` of one document, a few tokens at a time."""
    parts = []
    for begin in range(0, len(token_id_T), MASS_TOKENS):
        part = slice(begin, begin + MASS_TOKENS)
        start_BT = jnp.zeros((1, len(token_id_T[part])), jnp.int32)
        parts.append(
            metrics.block_mass(
                *(q_BTHK[:, part], k_BSGK, token_id_T[part], start_BT),
                key_block=key_block,
                scale=k_BSGK.shape[-1] ** -0.5,
            )
        )
    return jnp.concatenate(parts, axis=2)


def draw(records, path):
    """Recall, and mass by that of the best blocks, over the length of the text; a line for each way to route."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    values = {
        "recall of the flat route's blocks": lambda row: row["recall"],
        "mass caught, over the best 8 blocks'": lambda row: (
            row["mass_caught"] / row["oracle_mass"]
        ),
    }
    for axes, (label, value) in zip(figure.subplots(1, 2), values.items()):
        for name in dict.fromkeys(r["variant"] for r in records):
            mine = [r for r in records if r["variant"] == name]
            rows = sorted((r["tokens"], value(r)) for r in mine)
            axes.semilogx(*zip(*rows), "o-", label=name)
        axes.set(xlabel="tokens", ylabel=label, ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
