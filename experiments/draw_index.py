"""Draws the bookmarks of a real text: chains with their quoted words, and the tree of chapters.

Command: python -m experiments.draw_index --keys=PATH.npz [--group=0] [--blocks=96] [--block_tokens=16] [--chapter=8]
    PATH.npz holds k_TGK, one layer's keys of any model, and text_T, the text of each token (str, or one byte each as uint8).
    With --workdir=runs/tiny and --config=configs/tiny.py the file is made first, as in `experiments.index_recall`.
Hardware: any
Output: experiments/results/index_NAME.png and .html, NAME being the file's stem; the longest chains on the screen

A bookmark is linked to the earlier ones whose points its own points are most like; what stands beside a link are the words
around the two nearest tokens. The page is one file: point at a bookmark to see its passage and its links, click to keep it.
"""

import argparse
import dataclasses
import html
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import patches
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.index import build
from bsa.train import figures, settings
from configs import base
from experiments import index_recall, record

PAGE = pathlib.Path(__file__).with_name("draw_index.html")
WORD = re.compile(r"\w+")


def main() -> None:
    """Makes the file of keys if asked, then the picture, the page and the list of chains."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=96)
    parser.add_argument("--block_tokens", type=int, default=16)
    parser.add_argument("--chapter", type=int, default=8)
    parser.add_argument("--results", type=pathlib.Path, default=record.RESULTS)
    flags = parser.parse_args()
    if flags.workdir:
        keys = index_recall.trained_keys(flags.config, flags.workdir)
        np.savez_compressed(flags.keys, **keys)
    arrays = np.load(flags.keys)
    index = dataclasses.replace(
        settings.from_config(base.get_config()).model.index,
        C=flags.block_tokens,
        route="graph",
        P=3,
        children=6,
        link_by="points",
        similarity="pearson",
        chapter_bookmarks=flags.chapter,
        chapter_levels=3,
        chapter_R=2,
        beam=8,
    )
    bookmarks = read(
        arrays["k_TGK"], arrays["text_T"], index, flags.group, flags.blocks
    )
    for chain in longest_chains(bookmarks):
        print(" -> ".join(bookmarks[m]["quote"] for m in chain))
    target = flags.results / f"index_{flags.keys.stem}"
    draw(bookmarks, flags.chapter, target.with_suffix(".png"))
    write_page(bookmarks, flags.chapter, target.with_suffix(".html"))
    print(f"{target}.png and .html")


def read(k_TGK, text_T, index, group: int, num_blocks: int) -> list[dict]:
    """The first bookmarks of a text, each with its passage, its quotes and its links, as plain values.

    Returns:
        One dict per bookmark: "passage" and "quote" (str), "quotes" (one per point), "root" and "depth" (int), and
        "parents", a list of {"id", "weight", "quote", "their_quote"}, the most similar first.
    """
    pieces = [chr(x) for x in text_T] if text_T.dtype == np.uint8 else list(text_T)
    num_blocks = min(num_blocks, len(pieces) // index.C)
    k_1SGK = jnp.asarray(k_TGK[None, : num_blocks * index.C], jnp.float32)
    made = jax.jit(build.build_index, static_argnums=1)(k_1SGK, index)
    point, count, token_id, links = jax.device_get(
        (made.point_BGMRK, made.log_count_BGMR, made.quote_id_BGMR, made.links)
    )
    point_MRK, count_MR, token_MR = (x[0, group] for x in (point, count, token_id))
    parent_MP, weight_MP = links.parent_BGMP[0, group], links.weight_BGMP[0, group]
    bookmarks = []
    for m in range(num_blocks):
        quotes = [word_at(pieces, token) for token in token_MR[m]]
        parents = []
        for parent, weight in zip(parent_MP[m].tolist(), weight_MP[m].tolist()):
            if parent < 0:
                continue
            mine, theirs = nearest_points(point_MRK[m], point_MRK[parent])
            parents.append(
                {
                    "id": parent,
                    "weight": round(weight, 3),
                    "quote": quotes[mine],
                    "their_quote": bookmarks[parent]["quotes"][theirs],
                }
            )
        by_count = [quotes[r] for r in np.argsort(-count_MR[m], kind="stable")]
        telling = [parent["quote"] for parent in parents[:1]] + by_count
        bookmarks.append(
            {
                "passage": "".join(pieces[m * index.C : (m + 1) * index.C]),
                "quote": next(filter(WORD.search, telling), telling[0]),
                "quotes": quotes,
                "root": int(links.root_BGM[0, group, m]),
                "depth": int(links.depth_BGM[0, group, m]),
                "parents": parents,
            }
        )
    return bookmarks


def word_at(pieces: list[str], token: int) -> str:
    """The word that a token is part of; the token itself between words."""
    if token < 0:
        return ""
    first = max(0, token - 24)
    before = "".join(pieces[first:token])
    own = pieces[token]
    text = before + own + "".join(pieces[token + 1 : token + 24])
    begin, end = len(before), len(before) + len(own)
    for word in WORD.finditer(text):
        if word.end() > begin and word.start() < end:
            return word.group()
    return own.strip() or "␣"


def nearest_points(point_RK, other_RK) -> tuple[int, int]:
    """The pair of points with the highest Pearson correlation."""
    mine, theirs = (x - x.mean(-1, keepdims=True) for x in (point_RK, other_RK))
    mine, theirs = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-20)
        for x in (mine, theirs)
    )
    return np.unravel_index((mine @ theirs.T).argmax(), (len(mine), len(theirs)))


def longest_chains(bookmarks: list[dict], num: int = 8) -> list[list[int]]:
    """The longest ways along first parents, root first, at most one for each root."""
    chains = {}
    for m in sorted(range(len(bookmarks)), key=lambda m: -bookmarks[m]["depth"]):
        chains.setdefault(bookmarks[m]["root"], m)
    found = []
    for leaf in list(chains.values())[:num]:
        chain = [leaf]
        while bookmarks[chain[-1]]["parents"]:
            chain.append(bookmarks[chain[-1]]["parents"][0]["id"])
        found.append(chain[::-1])
    return found


def draw(bookmarks, chapter_size: int, path) -> None:
    """Bookmarks in order of time with their quotes; arcs to first parents above, levels of chapters below."""
    num = len(bookmarks)
    figure = Figure(figsize=(min(24, 4 + num / 5), 7))
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.subplots()
    for m, bookmark in enumerate(bookmarks):
        axes.text(
            m, -0.5, bookmark["quote"], rotation=90, va="top", ha="center", size=7
        )
        for rank, parent in enumerate(bookmark["parents"][:2]):
            width = m - parent["id"]
            axes.add_patch(
                patches.Arc(
                    (m - width / 2, 0),
                    width,
                    2 * width**0.7,
                    theta2=180,
                    linewidth=0.4 + 1.2 * max(0, parent["weight"]),
                    color=figures.GREY if rank else figures.BLUE,
                    alpha=0.3 if rank else 0.8,
                )
            )
    span, top = chapter_size, -7.0
    while span <= num:
        for first in range(0, num - span + 1, span):
            axes.add_patch(
                patches.Rectangle(
                    (first - 0.45, top - 1),
                    span - 0.1,
                    0.9,
                    facecolor=figures.NOTHING,
                    edgecolor=figures.GREY,
                )
            )
            axes.text(
                first + span / 2 - 0.5,
                top - 0.55,
                ", ".join(title(bookmarks[first : first + span], 2 + span // 8)),
                ha="center",
                va="center",
                size=6,
                clip_on=True,
            )
        span, top = span * chapter_size, top - 1.2
    axes.set_xlim(-1, num)
    axes.set_ylim(top - 0.2, 1.1 * num**0.7)
    axes.set_yticks([])
    axes.set_xlabel(
        "bookmark, one per block; arcs lead to the most similar earlier ones"
    )
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figures.DOTS_PER_INCH, bbox_inches="tight")


def title(members: list[dict], words: int) -> list[str]:
    """A chapter's most quoted words, as its heading."""
    quotes = [quote for member in members for quote in member["quotes"]]
    quotes = [quote for quote in quotes if len(quote) > 2]
    return sorted(dict.fromkeys(quotes), key=lambda quote: -quotes.count(quote))[:words]


def write_page(bookmarks, chapter_size: int, path) -> None:
    """The same as one HTML file that answers to the pointer."""
    chains = [
        " → ".join(html.escape(bookmarks[m]["quote"]) for m in chain)
        for chain in longest_chains(bookmarks)
    ]
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("CHAINS", "".join(f"<li>{chain}</li>" for chain in chains))
    page = page.replace("CHAPTERS", chapter_tree(bookmarks, chapter_size))
    data = json.dumps(bookmarks, ensure_ascii=False).replace("</", "<\\/")
    path.write_text(page.replace("BOOKMARKS", data), encoding="utf-8")


def chapter_tree(bookmarks, chapter_size: int) -> str:
    """Complete chapters as nested lists that open and close, the coarsest outermost."""
    rows = [
        f'<a href="#" data-id="{m}">{html.escape(bookmark["passage"])}</a>'
        for m, bookmark in enumerate(bookmarks)
    ]
    left, span = [], 1
    while len(rows) >= chapter_size:
        span *= chapter_size
        complete = len(rows) // chapter_size
        rows, left = (
            rows[: complete * chapter_size],
            rows[complete * chapter_size :] + left,
        )
        rows = [
            chapter_html(
                bookmarks[e * span : (e + 1) * span],
                rows[e * chapter_size :][:chapter_size],
            )
            for e in range(complete)
        ]
    rows += left
    return "<ul>" + "".join(f"<li>{row}</li>" for row in rows) + "</ul>"


def chapter_html(bookmarks, rows: list[str]) -> str:
    """One chapter: its title, and its members below."""
    heading = html.escape(", ".join(title(bookmarks, 8)))
    inside = "".join(f"<li>{row}</li>" for row in rows)
    return f"<details><summary>{heading}</summary><ul>{inside}</ul></details>"


if __name__ == "__main__":
    main()
