"""What a run measured to PNG files; plain data in, so that notebooks draw the same figures.

`bsa/train/evaluate.py` calls all of them at the end of a run.
"""

import itertools
import math

import numpy as np
from matplotlib import colors, ticker
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f5fa8", "#d9661f", "#8a8f98"
NOTHING = "#f1f2f4"  # behind cells without a value
SEQUENTIAL = "Blues"
DOTS_PER_INCH = 150


def loss_curve(records: list[dict], path) -> None:
    """Training loss and held-out bits by step.

    Args:
        records: lines of `metrics.jsonl`. "bits_per_byte" is of training batches,
            "heldout_bits_per_byte" of held-out text; a record may lack either.
        path: the PNG to write.
    """
    axes = _new_axes("Bits per byte during training", "step", "bits per byte")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for name, label, style in (
        ("bits_per_byte", "training batch", {"color": BLUE, "linewidth": 1.2}),
        (
            "heldout_bits_per_byte",
            "held-out text",
            {"color": ORANGE, "linewidth": 1.6, "marker": "o", "markersize": 4},
        ),
    ):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if not points:
            continue
        if len(points) == 1:
            style = style | {"marker": "o"}
        axes.plot(*zip(*points), label=label, **style)
        _name_last_point(axes, *points[-1], style["color"])
    _finish(axes, path, legend=True)


def bits_by_position(evaluation: dict, path) -> None:
    """Held-out bits per byte by position in the row: does more context help?

    Args:
        evaluation: its "bits_per_byte_by_position" is a list of {"first", "last",
            "bits_per_byte"}: positions in tokens, both ends included.
        path: the PNG to write.
    """
    buckets = evaluation["bits_per_byte_by_position"]
    axes = _new_axes(
        "Held-out bits per byte by position", "position (tokens)", "bits per byte"
    )
    buckets = [b for b in buckets if b["bits_per_byte"] is not None]
    if buckets:
        edges = [b["first"] + 1 for b in buckets] + [buckets[-1]["last"] + 2]
        bits = [b["bits_per_byte"] for b in buckets]
        axes.set_xscale("log", base=2)
        axes.stairs(bits, edges, color=BLUE, linewidth=2, baseline=None)
        centers = [math.sqrt(a * b) for a, b in itertools.pairwise(edges)]
        for center, value in zip(centers, bits):
            axes.annotate(
                f"{value:.2f}",
                (center, value),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tokens))
        axes.margins(y=0.15)
    _finish(axes, path)


def needle_map(evaluation: dict, path) -> None:
    """Share of passkeys recalled, by length of the document and depth of the key.

    Args:
        evaluation: its "passkey_accuracy" is a list of {"tokens", "depth", "accuracy"}:
            length in tokens, depth from 0 (first) to 1 (last), share from 0 to 1.
        path: the PNG to write.
    """
    cells = evaluation["passkey_accuracy"]
    axes = _new_axes(
        "Passkeys recalled", "length of the document (tokens)", "depth of the key"
    )
    tokens = sorted({cell["tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    if cells:
        axes.set_facecolor(NOTHING)
        accuracy = np.full((len(depths), len(tokens)), np.nan)
        for cell in cells:
            at = depths.index(cell["depth"]), tokens.index(cell["tokens"])
            accuracy[at] = cell["accuracy"]
        image = axes.imshow(accuracy, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(accuracy):
            if not np.isnan(value):
                color = "white" if value > 0.6 else "black"
                axes.text(
                    column, row, f"{value:.0%}", ha="center", va="center", color=color
                )
        axes.set_xticks(range(len(tokens)), [_tokens(value) for value in tokens])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        bar = axes.figure.colorbar(image, ax=axes, format=ticker.PercentFormatter(1))
        bar.set_label("passkeys recalled")
        axes.grid(False)
    _finish(axes, path)


def selection_picture(read_QN, path, *, query_block=1, key_block=1, title="") -> None:
    """Which key blocks each query block reads: the window, the sinks and the far jumps.

    Args:
        read_QN: bool, or the share from 0 to 1 of a query block's tokens (or heads)
            that read the key block.
        path: the PNG to write.
        query_block: tokens of a query block.
        key_block: tokens of a key block.
        title: which layer and head this is.
    """
    is_bool = read_QN.dtype == bool
    num_queries, num_keys = read_QN.shape
    query_len, key_len = num_queries * query_block, num_keys * key_block
    axes = _new_axes(
        title or "Key blocks read by each query block",
        "key position (tokens)",
        "query position (tokens)",
        size=(6.4, 5.6),
    )
    axes.set_facecolor(NOTHING)
    image = axes.imshow(
        np.ma.masked_equal(read_QN.astype(np.float32), 0),
        cmap=colors.LinearSegmentedColormap.from_list("read", ["#a9c8ea", BLUE]),
        vmin=0,
        vmax=1,
        extent=(0, key_len, query_len, 0),
        interpolation="nearest",
        aspect="auto",
    )
    end = min(query_len, key_len)
    axes.plot([0, end], [0, end], color=ORANGE, linewidth=1, label="own position")
    axes.set_xlim(0, key_len)
    axes.set_ylim(query_len, 0)
    for axis, length in ((axes.xaxis, key_len), (axes.yaxis, query_len)):
        axis.set_major_locator(
            ticker.MultipleLocator(2 ** max(length - 1, 1).bit_length() / 8)
        )
        axis.set_major_formatter(ticker.FuncFormatter(_tokens))
    if not is_bool:
        bar = axes.figure.colorbar(image, ax=axes, format=ticker.PercentFormatter(1))
        bar.set_label("share of the query block that reads")
    axes.grid(False)
    _finish(axes, path, legend=True)


def _new_axes(title, xlabel, ylabel, size=(6.4, 4.0)):
    """Axes of a figure of its own, with no state shared between threads or notebooks."""
    figure = Figure(figsize=size, layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _finish(axes, path, legend=False):
    """Writes the file; axes without data say so."""
    if not axes.has_data():
        axes.text(
            0.5,
            0.5,
            "nothing measured",
            transform=axes.transAxes,
            ha="center",
            color=GREY,
        )
        axes.set_xticks([])
        axes.set_yticks([])
    elif legend:
        axes.legend(frameon=False)
    axes.figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _name_last_point(axes, x, y, color):
    """Writes a curve's last value beside its end."""
    axes.annotate(
        f"{y:.2f}",
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=color,
        annotation_clip=False,
    )


def _tokens(value, _=None):
    """A length in tokens as people write it: 512, 8K, 1M."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{int(value // size)}{unit}"
    return f"{value:g}"
