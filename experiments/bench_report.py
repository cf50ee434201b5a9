"""Result files of `bench_kernels` to one: kernels_h100.json, the figure beside it, and RESULTS.md's tables.

Command: python -m experiments.bench_report [FILE.json ...]

Files of several runs are joined, a later record in place of an earlier one of the same measurement; a failure only where
nothing succeeded. Each record says by which command, when, at which commit and on which device it was made. Without files,
the figure alone is drawn anew.
"""

import json
import pathlib
import sys

from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from experiments import record

NAME = "kernels_h100"
CELL = (
    *("part", "case", "length", "pass", "implementation", "route", "pool", "batch"),
    *("query_block", "key_block", "K", "T", "S", "H", "masked", "biased", "dtype"),
)
"""What tells measurements apart."""
UNSAID = {"query_block": 16}
"""What is so in rows of `nsa` from before query blocks were shorter, which don't say it."""
ORIGIN = ("command", "commit", "date", "device")
STEPS = ("build", "route", "unite", "attend")
DENSE = "cudnn"


def join(files):
    """(origin, records) of result files, oldest first."""
    joined = {}
    for result in files:
        for row in result["records"]:
            made = {key: row.get(key, result[key]) for key in ORIGIN}
            key = tuple(row.get(name, UNSAID.get(name)) for name in CELL)
            if "failed" not in row or "failed" in joined.get(key, row):
                joined[key] = row | made
    good = [row for row in joined.values() if "failed" not in row]
    origin = {key: value for key, value in files[-1].items() if key != "records"}
    return origin, [
        row
        for row in joined.values()
        if "failed" not in row or not any(_covers(other, row) for other in good)
    ]


def _covers(row, failed):
    """Whether a record has all that a failure says of what failed."""
    return all(row.get(name) == failed[name] for name in CELL if name in failed)


def draw(records, device, path):
    """Rates and times over length; only what was measured."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    rates, times = figure.subplots(2, 2)
    for axes, of_pass in zip(rates, ("forward", "forward+backward")):
        rows = [row for row in _good(records, "time") if row["pass"] == of_pass]
        for name in dict.fromkeys(row["implementation"] for row in rows):
            mine = [row for row in rows if row["implementation"] == name]
            style = {DENSE: "--", "flex": ":"}.get(name, "-")
            for case in dict.fromkeys(row["case"] for row in mine):
                label = f"{name}, dense" if name == DENSE else f"{name} {case}"
                _line(axes, [row for row in mine if row["case"] == case], style, label)
        axes.set_ylabel(f"{of_pass}, TFLOP/s of listed pairs")
    for axes, of_pass in zip(times, ("forward", "forward+backward")):
        rows = [row for row in _good(records, "end_to_end") if row["pass"] == of_pass]
        for name in dict.fromkeys(row.get("route") for row in rows):
            mine = [row for row in rows if row.get("route") == name]
            label = "dense, cudnn" if name is None else f"bookmarks, {name}"
            _line(axes, mine, "--" if name is None else "-", label, "ms")
        axes.set_ylabel(f"{of_pass} of a layer, keys to output, ms")
        axes.set_yscale("log")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        if axes.lines:
            axes.legend(fontsize=7)
    figure.suptitle(device)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _line(axes, rows, style, label, value="tflops"):
    rows = sorted(rows, key=lambda row: row["length"])
    x, y = ([row[name] for row in rows] for name in ("length", value))
    axes.plot(x, y, style, marker="o", label=label)


def _good(records, part):
    return [row for row in records if row["part"] == part and "failed" not in row]


def tables(result):
    """The tables of a result file; a part that was not measured has none, and no records give nothing."""
    records = result["records"]
    parts = (_rate_table, _layer_table, _nsa_table, _decode_table)
    found = [text for make in parts if (text := make(records))]
    if not found:
        return ""
    commands = ", ".join(dict.fromkeys(f"`{row['command']}`" for row in records))
    commits = ", ".join(dict.fromkeys(row["commit"][:12] for row in records))
    devices = ", ".join(dict.fromkeys(row["device"] for row in records))
    found.append(f"{commands}, commits {commits}, {devices}")
    return "\n\n".join(found)


def _table(head, rows):
    """Markdown, or nothing for no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _select(records, part, **wanted):
    """{cell without its pass: {pass: row}} of what was measured."""
    found = {}
    for row in _good(records, part):
        if all(row.get(key) == value for key, value in wanted.items()):
            names = ("length", "case", "route", "query_block")
            cell = tuple(row.get(name, UNSAID.get(name)) for name in names)
            found.setdefault(cell, {})[row.get("pass")] = row
    return found


def _cell(row, form):
    """A row's figures, empty where it lacks one of them."""
    try:
        return form.format_map(row or {})
    except KeyError:
        return ""


def _rate_table(records):
    flex = _select(records, "time", implementation="flex")
    rows = []
    ours = _select(records, "time", implementation="mosaic_gpu")
    for cell in sorted(ours, key=lambda cell: cell[:2]):
        passes = ours[cell]
        line = [cell[1], f"{cell[0]:,}", _device(passes)]
        for name in ("forward", "forward+backward"):
            found = passes.get(name)
            beside = _cell(found, "{tflops:.0f} ({of_cudnn:.2f})")
            line.append(beside or _cell(found, "{tflops:.0f}"))
            peer = flex.get(cell, {}).get(name)
            line.append(_cell(peer, "{ours_over_this:.1f}x"))
        rows.append(line)
    passes = ("forward", "over Flex", "forward+backward", "over Flex")
    return _table(["query x key block", "tokens", "device", *passes], rows)


def _layer_table(records):
    rows = []
    for (length, _, route, _), passes in _select(records, "end_to_end").items():
        if route is None:
            continue
        line = [f"{length:,}", route, _device(passes)]
        for name in ("forward", "forward+backward"):
            found = passes.get(name)
            beside = _cell(found, "{ms:.1f} ({times_dense:.1f}x)")
            line.append(beside or _cell(found, "{ms:.1f}"))
        line += [_cell(passes.get(name), "{ms:.1f}") for name in STEPS]
        rows.append(line)
    whole = ("forward, ms (dense over it)", "forward+backward")
    return _table(["tokens", "route", "device", *whole, *STEPS], rows)


def _device(passes):
    """Where a cell's passes were measured."""
    return ", ".join(dict.fromkeys(row["device"] for row in passes.values()))


def _nsa_table(records):
    """Times of each query block, and the one time of the peer in the same run over each."""
    rows = []
    peers = {
        cell[:2]: passes
        for cell, passes in _select(records, "nsa", implementation="fla_nsa").items()
    }
    ours = _select(records, "nsa", implementation="mosaic_gpu").items()
    for (length, case, _, block), passes in sorted(ours, key=_order_nsa):
        line = [
            f"{length:,}",
            str(block),
            _cell(passes.get("forward"), "{union_blocks:.0f}"),
        ]
        line.append(_device(passes))
        for name in ("forward", "forward+backward"):
            row, peer = passes.get(name), peers.get((length, case), {}).get(name)
            line.append(_cell(row, "{ms:.1f}"))
            if row and peer and row["date"] == peer["date"]:
                peer = peer | {"ratio": peer["ms"] / row["ms"]}
            line.append(_cell(peer, "{ms:.1f} ({ratio:.2f}x)"))
        rows.append(line)
    passes = ("forward, ms", "fla's", "forward+backward, ms", "fla's")
    return _table(["tokens", "query block", "blocks it reads", "device", *passes], rows)


def _order_nsa(item):
    """Lengths, and pools, from short to long; query blocks from long to short."""
    (length, _, _, block), passes = item
    pool = next(iter(passes.values()))["pool"]
    return length, pool, -block


def _decode_table(records):
    form = (
        "{batch}|{length:,}|{ms:.3f}|{dense_ms:.2f} ({times_dense:.0f}x)|{of_copy:.2f}"
    )
    rows = [form.format_map(row).split("|") for row in _good(records, "decode")]
    head = ["sequences", "tokens", "a token, ms", "dense, ms", "of copy bandwidth"]
    return _table(head, rows)


def pair_table(result, name):
    """Rates of one implementation beside those of the others in its run."""
    rows = []
    mine = [r for r in _good(result["records"], "time") if r["implementation"] == name]
    for row in mine:
        cell = row["case"], row["length"], row["pass"]
        peers = [
            f"{other['implementation']} {other['tflops']:.0f}"
            for other in _good(result["records"], "time")
            if (other["case"], other["length"], other["pass"]) == cell
            and other["implementation"] != name
        ]
        line = [row["case"], f"{row['length']:,}", row["pass"]]
        rows.append([*line, f"{row['tflops']:.0f}", ", ".join(peers)])
    table = _table(["query x key block", "tokens", "pass", name, "beside it"], rows)
    return f"{table}\n\n`{mine[0]['command']}`, commit {mine[0]['commit']}, {mine[0]['device']}"


def main():
    paths = [pathlib.Path(x) for x in sys.argv[1:]]
    if paths:
        files = [json.loads(path.read_text()) for path in paths]
        if (record.RESULTS / f"{NAME}.json").exists():
            files.insert(0, record.read(NAME))
        record.write(NAME, *join(files))
    result = record.read(NAME)
    draw(result["records"], result["device"], record.RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
