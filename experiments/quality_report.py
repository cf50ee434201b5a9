"""Cells of `experiments.quality` to `quality.json`, a Markdown table and a figure for each suite."""

import math
import operator
import pathlib

from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from experiments import record

ORIGIN = ("commit", "date", "device")


def write(suite: str, found: list[dict], folder: pathlib.Path) -> None:
    """Records of a suite's cells, in place of those that were there of the same method and seed; others stay.

    Records: suite, task, method, seed, length (tokens), attended_tokens (mean over tokens and layers), refused_choices (that
    found no room in a list, mean over lists and bookmark layers), params, train_tokens, score, chance, and the cell's own
    commit, date and device.
    """
    rows = [
        row | {name: cell["origin"][name] for name in ORIGIN}
        for cell in found
        for row in cell["records"]
    ]
    if not rows:
        return
    cell = operator.itemgetter("suite", "method", "seed")
    replaced = set(map(cell, rows))
    known = record.read("quality", folder)["records"]
    rows = [row for row in known if cell(row) not in replaced] + rows
    record.write("quality", found[-1]["origin"], rows, folder)
    rows = [row for row in rows if row["suite"] == suite]
    (folder / f"quality_{suite}.md").write_text(table(rows))
    draw(rows, folder / f"quality_{suite}.png")


def table(rows: list[dict]) -> str:
    """A row for each test, a column for each method: mean over seeds, and the range where there are several."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    tests = _tests(rows)
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
    seeds = {m: len({r["seed"] for r in rows if r["method"] == m}) for m in methods}
    seeds = ", ".join(f"{method} {number}" for method, number in seeds.items())
    made = sorted({tuple(row[name] for name in ORIGIN) for row in rows})
    where = "; ".join(
        f"commit {commit}, {date}, {device}" for commit, date, device in made
    )
    return "\n".join([*lines, "", f"Seeds: {seeds}; mean (least to most). {where}", ""])


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Score of each test, a panel for each kind of task, a line for each method with the range over seeds."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    kinds = list(dict.fromkeys(row["task"].split()[0] for row in rows))
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    most = max(
        sum(test[0].split()[0] == kind for test in _tests(rows)) for kind in kinds
    )
    size = columns * max(3.6, 0.9 * most, 7 / columns), 3.4 * lines + 0.5
    figure = Figure(figsize=size, layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, kind in zip(panels, kinds):
        _panel(axes, [row for row in rows if row["task"].split()[0] == kind], methods)
        axes.set_title(kind, fontsize=9)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    names = {"loc": "outside upper center", "ncols": min(4, len(labels))}
    figure.legend(handles, labels, fontsize=8, **names)
    figure.savefig(path, dpi=130)


def _panel(axes, rows, methods):
    """One kind of task: its lengths and options along x."""
    tests = _tests(rows)
    for method in methods:
        scores = [
            [
                row["score"]
                for row in rows
                if (row["method"], row["task"], row["length"]) == (method, *test)
            ]
            for test in tests
        ]
        # A method that is still missing leaves a gap.
        places = [i for i, values in enumerate(scores) if values]
        mean = [sum(scores[i]) / len(scores[i]) for i in places]
        (line,) = axes.plot(places, mean, ".-", label=method)
        low, high = [min(scores[i]) for i in places], [max(scores[i]) for i in places]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2)
    chance = {(row["task"], row["length"]): row["chance"] for row in rows}
    # Of bits, where less is better, chance lies far above all.
    if min(chance.values()) <= 1:
        axes.plot(range(len(tests)), list(chance.values()), "k_:", label="chance")
        axes.set_ylim(-0.03, 1.03)
    labels = ["\n".join([f"{n:,}", *task.split()[1:]]) for task, n in tests]
    axes.set_xticks(range(len(tests)), labels, fontsize=6)
    axes.grid(alpha=0.3)


def _tests(rows):
    """Tasks and lengths, in order."""
    return list(dict.fromkeys((row["task"], row["length"]) for row in rows))


def _spread(rows, method, name, form):
    """Mean over a method's rows, and their range."""
    values = [row[name] for row in rows if row["method"] == method]
    if not values:
        return ""
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"
