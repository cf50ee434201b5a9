"""Readings to the passages that an answer rests on, with the bookmarks that led there, as text and as a page."""

import dataclasses
import html
from collections.abc import Callable, Iterator

import jax
import numpy as np

from bsa.decode import attend
from bsa.decode import cache as caches
from bsa.index import build
from bsa.model import settings as model_settings

QUOTE_TOKENS = 24
"""Text shown on either side of a quoted token."""

LONGEST_CHAIN = 8


@dataclasses.dataclass(frozen=True)
class Passage:
    """A block beyond the window that was read for an answer, in one layer.

    Attributes:
        layer: from 0.
        first: place of its first token.
        text: the block's own.
        mass: attention that fell on it, in tokens: summed over the answer's tokens, the mean over heads.
        readers: answer tokens of which some head read it.
        chain: text of the chapters above it, the coarsest first, then of its first parents, the nearest first.
    """

    layer: int
    first: int
    text: str
    mass: float
    readers: int
    chain: tuple[str, ...]


def passages(
    readings: list[list[attend.Reading | None]],
    cache: caches.Cache,
    token_T: np.ndarray,
    model: model_settings.ModelSettings,
    decode: Callable[[np.ndarray], str],
    *,
    most: int = 5,
) -> list[Passage]:
    """The passages that drew most attention, layer by layer, of a single row.

    Args:
        readings: of each token of the answer, weighed; the first was drawn by the text's last token.
        cache: after the answer, or at any time since the text was read.
        token_T: the prompt.
        decode: tokens to text, see `vocabulary.Vocabulary`.
        most: passages a layer.
    """

    def show(first, end):
        """Part of the prompt on one line."""
        return " ".join(decode(token_T[max(first, 0) : max(end, 0)]).split())

    found = []
    for layer, memory in enumerate(cache.layers):
        if memory.index is None:
            continue
        of_layer = [reading[layer] for reading in readings]
        letter = layer % len(model.pattern)
        mass_GN, readers_N = _tally(of_layer, len(token_T) - 1, model, letter)
        bookmarks = jax.tree.map(lambda x: x[0], memory.index.bookmarks)
        mass_N = mass_GN.mean(0)
        for block_id in np.argsort(-mass_N, kind="stable")[:most].tolist():
            if not readers_N[block_id]:
                break
            group = int(mass_GN[:, block_id].argmax())
            first = block_id * model.index.C
            found.append(
                Passage(
                    layer,
                    first,
                    show(first, first + model.index.C),
                    float(mass_N[block_id]),
                    int(readers_N[block_id]),
                    tuple(_chain(bookmarks, group, block_id, show, model.index)),
                )
            )
    return found


def as_text(found: list[Passage]) -> Iterator[str]:
    """Lines to be read in a terminal."""
    if not found:
        yield "no passage beyond the windows was read"
    for passage in found:
        yield (
            f"layer {passage.layer}, token {passage.first:,}: {passage.text!r} "
            f"(attention {passage.mass:.3f}, read for {passage.readers} tokens)"
        )
        for step in passage.chain:
            yield f"    {step}"


def as_page(found: list[Passage], question: str, answer: str) -> str:
    """One HTML page without scripts or other files."""
    rows = []
    for passage in found:
        chain = "".join(f"<li>{html.escape(step)}</li>" for step in passage.chain)
        rows.append(
            f"<tr><td>{passage.layer}</td><td>{passage.first:,}</td><td>{passage.mass:.3f}</td>"
            f"<td>{passage.readers}</td><td><q>{html.escape(passage.text)}</q><ol>{chain}</ol></td></tr>"
        )
    return (
        "<!doctype html><meta charset='utf-8'><title>What an answer rests on</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border-top:1px solid #ccc;padding:.4em;text-align:left;"
        "vertical-align:top}ol{color:#555;margin:.3em 0}q{white-space:pre-wrap}</style>"
        f"<h1>{html.escape(question)}</h1><p>{html.escape(answer)}</p>"
        "<table><tr><th>layer<th>token<th>attention<th>readers<th>passage, and the bookmarks that led there</tr>"
        f"{''.join(rows)}</table>\n"
    )


def _tally(readings, first_reader, model, letter):
    """Attention of each head group and readers of each block beyond sinks and window: [G, N] and [N]."""
    num_blocks = (first_reader + len(readings)) // model.index.C + 1
    mass_GN = np.zeros((model.G, num_blocks))
    readers_N = np.zeros(num_blocks, int)
    sinks = model.index.sink_tokens // model.index.C
    for place, reading in enumerate(readings, first_reader):
        block_id_GJ, mass_GJ = jax.device_get(
            (reading.block_id_BGJ[0], reading.mass_BGJ[0])
        )
        low = place // model.index.C - model.window_tokens[letter] // model.index.C + 1
        group, entry = np.nonzero((block_id_GJ >= sinks) & (block_id_GJ < low))
        block_id = block_id_GJ[group, entry]
        np.add.at(mass_GN, (group, block_id), mass_GJ[group, entry])
        readers_N[np.unique(block_id)] += 1
    return mass_GN, readers_N


def _chain(bookmarks: build.BookmarkIndex, group, block_id, show, index):
    """What led to a block: chapters from the coarsest down, its own bookmark, and its first parents."""
    if bookmarks.spans is not None:
        length_M = np.asarray(bookmarks.spans.length_BGM[group, : block_id + 1])
        block_id = int(np.flatnonzero(length_M)[-1])
    yield from _chapters(bookmarks, group, block_id, index)
    for depth in range(LONGEST_CHAIN):
        name = "bookmark" if not depth else "its parent"
        quotes = np.asarray(bookmarks.quote_id_BGMR[group, block_id])
        shown = (
            show(token - QUOTE_TOKENS, token + QUOTE_TOKENS)
            for token in sorted({int(quote) for quote in quotes if quote >= 0})
        )
        yield f"{name} {block_id}: {' | '.join(shown)}"
        if bookmarks.links is None:
            return
        block_id = int(bookmarks.links.parent_BGMP[group, block_id, 0])
        if block_id < 0:
            return


def _chapters(bookmarks, group, block_id, index):
    """The chapters above a bookmark, from the coarsest down; none in a volume that is not complete."""
    if bookmarks.member_BGM is None:
        order_M, kind = np.arange(bookmarks.point_BGMRK.shape[1]), "of"
    else:
        order_M, kind = np.asarray(bookmarks.member_BGM[group]), "among"
    if block_id not in order_M:
        return
    place = int(np.argmax(order_M == block_id))
    for level in range(len(bookmarks.chapters), 0, -1):
        size = index.chapter_bookmarks**level
        member = order_M[place // size * size :][:size]
        first, end = member.min() * index.C, (member.max() + 1) * index.C
        yield f"chapter {kind} tokens {first:,}-{end - 1:,}"
