"""Cells of `experiments.quality` to `quality.json`, a Markdown table and a figure for each suite."""

import math
import pathlib

from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from experiments import record

ORIGIN = ("commit", "date", "device")


def write(suite: str, found: list[dict], folder: pathlib.Path) -> None:
    """Records of a suite's cells, in place of those it had before; other suites' stay.

    Records: suite, task, method, seed, length (tokens), attended_tokens (mean over tokens and layers), params,
    train_tokens, score, chance, and the cell's own commit, date and device.
    """
    rows = [
        row | {name: cell["origin"][name] for name in ORIGIN}
        for cell in found
        for row in cell["records"]
    ]
    if not rows:
        return
    others = [
        row
        for row in record.read("quality", folder)["records"]
        if row["suite"] != suite
    ]
    record.write("quality", found[-1]["origin"], others + rows, folder)
    (folder / f"quality_{suite}.md").write_text(table(rows))
    draw(rows, folder / f"quality_{suite}.png")


def table(rows: list[dict]) -> str:
    """A row for each test, a column for each method: mean over seeds, and the range where there are several."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    tests = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    lines = [
        f"| task | length | chance | {' | '.join(methods)} |",
        "|" + "---|" * (3 + len(methods)),
    ]
    for task, length in tests:
        mine = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        cells = [_spread(mine, method, "score", "{:.3f}") for method in methods]
        chance = f"{mine[0]['chance']:.2g}"
        lines.append(f"| {task} | {length:,} | {chance} | {' | '.join(cells)} |")
    for length in sorted({length for _, length in tests}):
        mine = [row for row in rows if row["length"] == length]
        cells = [
            _spread(mine, method, "attended_tokens", "{:.0f}") for method in methods
        ]
        lines.append(f"| attended tokens | {length:,} | | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in rows})
    made = sorted({tuple(row[name] for name in ORIGIN) for row in rows})
    where = "; ".join(
        f"commit {commit}, {date}, {device}" for commit, date, device in made
    )
    return "\n".join([*lines, "", f"{seeds} seeds; mean (least to most). {where}", ""])


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Score over length, a panel for each task, a line for each method with the range over seeds."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines + 0.5), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, task in zip(panels, tasks):
        mine = [row for row in rows if row["task"] == task]
        for method in dict.fromkeys(row["method"] for row in rows):
            points = _by_length([row for row in mine if row["method"] == method])
            lengths, mean, low, high = zip(*points) if points else ((),) * 4
            (line,) = axes.plot(lengths, mean, ".-", label=method)
            axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
        chance = {row["length"]: row["chance"] for row in mine}
        axes.plot(
            list(chance), list(chance.values()), "k:", linewidth=1, label="chance"
        )
        axes.set_title(task, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    figure.supxlabel("length (tokens)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=130)


def _by_length(rows):
    """(length, mean, least, most) over seeds."""
    scores = {}
    for row in rows:
        scores.setdefault(row["length"], []).append(row["score"])
    return [
        (length, sum(s) / len(s), min(s), max(s))
        for length, s in sorted(scores.items())
    ]


def _spread(rows, method, name, form):
    """Mean over a method's rows, and their range."""
    values = [row[name] for row in rows if row["method"] == method]
    if not values:
        return ""
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"
