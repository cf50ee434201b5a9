"""Writes the tables of README.md and RESULTS.md from `experiments/results`, between the comments that name them.

Command: python -m experiments.tables [--check]
"""

import functools
import pathlib
import sys

from experiments import bench_report, glance, quality_report, record

HERE = pathlib.Path(__file__).parent
FILES = (HERE.parent / "README.md", HERE / "RESULTS.md")


def small() -> str:
    """The comparison of `experiments.small`, a row for each kind."""
    result = record.read("small")
    lines = [
        "| every fourth layer | attended tokens | bits per byte | at 4,096-8,191 | passkeys at 1K / 2K / 4K / 8K |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in result["records"]):
        mine = [row for row in result["records"] if row["kind"] == kind]
        whole = {row["metric"]: row["value"] for row in mine}
        far = max(
            (row for row in mine if row["metric"] == "bits_at"),
            key=lambda row: row["last"],
        )
        keys = [row for row in mine if row["metric"] == "passkey"]
        shares = []
        for length in sorted({row["last"] for row in keys}):
            cells = [row["value"] for row in keys if row["last"] == length]
            shares.append(f"{sum(cells) / len(cells):.0%}")
        lines.append(
            f"| {kind} | {whole['attended_tokens']:.0f} | {whole['bits_per_byte']:.3f} | {far['value']:.3f} "
            f"| {' / '.join(shares)} |"
        )
    origin = f"`{result['command']}`, {result['date']}, commit {result['commit']}, {result['device']}"
    return "\n".join([*lines, "", origin])


def pretrained() -> str:
    """Nats of `experiments.pretrained` at one budget, and how far each method is from dense."""
    result = record.read("pretrained")
    rows = {
        (row["text"], row["method"]): row
        for row in result["records"]
        if row["method"] == "dense" or row["budget"] == PRETRAINED_BUDGET
    }
    methods = dict.fromkeys(method for _, method in rows)
    lines = [
        f"| text | {' | '.join(methods)} |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for text in dict.fromkeys(text for text, _ in rows):
        dense = rows[text, "dense"]["nats"]
        cells = []
        for method in methods:
            nats = rows[text, method]["nats"] if (text, method) in rows else None
            far = (
                ""
                if method == "dense" or nats is None
                else f" (+{nats / dense - 1:.1%})"
            )
            cells.append("" if nats is None else f"{nats:.3f}{far}")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    shown = rows.values()
    commits, devices = (
        ", ".join(dict.fromkeys(row[name] for row in shown))
        for name in ("commit", "device")
    )
    origin = f"`{result['command']}`, {result['date']}, commits {commits}, {devices}"
    return "\n".join([*lines, "", origin])


def train_1m() -> str:
    """Speed and memory of `experiments.train_1m`, a row for each length and kind."""
    result = record.read("train_1m")
    lines = [
        "| tokens | kind | attended tokens | tokens a second | peak memory, GB | loss, first to last step | device |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["records"], key=lambda row: (row["kind"], row["tokens"])):
        lines.append(
            f"| {row['tokens']:,} | {row['kind']} | {row['attended_tokens']:,.0f} | {row['tokens_per_s']:,.0f} "
            f"| {row['peak_bytes'] / 1e9:.1f} | {row['loss_first']:.2f} to {row['loss_last']:.2f} ({row['steps']} steps) "
            f"| {row['device']} |"
        )
    origin = f"`{result['command']}`, {result['date']}, commit {result['commit']}, {result['device']}"
    return "\n".join([*lines, "", origin])


def suite(name: str, *tasks: str) -> str:
    """The table of a suite of `experiments.quality`, or of some of its tasks (first words of their names)."""
    rows = [
        row
        for row in record.read("quality")["records"]
        if row["suite"] == name and (not tasks or row["task"].split()[0] in tasks)
    ]
    methods = ",".join(dict.fromkeys(row["method"] for row in rows))
    command = f"`python -m experiments.quality --suite={name} --methods={methods}`"
    return f"{quality_report.table(rows).rstrip()}, {command}"


def context_parallel() -> str:
    """Times of `experiments.context_parallel` on several devices, against one."""
    result = record.read("context_parallel")
    lines = [
        "| tokens | devices | transport | pass | ms | efficiency | bytes over union |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["records"], key=lambda row: row["tokens"]):
        if row["devices"] > 1:
            lines.append(
                f"| {row['tokens']:,} | {row['devices']} | {row['transport']} | {row['pass']} | {row['ms']:.1f} "
                f"| {row['efficiency']:.2f} | {row['bytes_over_union']:.2f} |"
            )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["records"]))
    origin = f"`{result['command']}`, {result['date']}, commits {commits}, {result['device']}"
    return "\n".join([*lines, "", origin])


def kernels() -> str:
    """What `experiments.bench_kernels` measured, as far as it has."""
    return bench_report.tables(record.read(bench_report.NAME))


def triton() -> str:
    """The Triton kernels beside the Hopper ones, on the same tensors in one run."""
    return bench_report.pair_table(record.read("kernels_triton"), "triton")


def decode() -> str:
    """What `experiments.decode` measured on GPUs, a row for each cell."""
    result = record.read("decode")
    lines = [
        "| tokens | rows | kind | read by | tokens a call | prefill, tokens a second | in pieces of | ms a token | cache, GB | peak, GB | device |",
        "|---" * 11 + "|",
    ]
    for row in sorted(
        result["records"], key=lambda row: (row["tokens"], row["batch"], row["kind"])
    ):
        rate, piece = row["prefill_tokens_per_s"], row.get("piece")
        lines.append(
            f"| {row['tokens']:,} | {row['batch']} | {row['kind']} | {row['granularity']} | {row['tokens_a_call']} "
            f"| {f'{rate:,.0f}' if rate else ''} | {f'{piece:,}' if piece else ''} | {row['ms_per_token']:.2f} | {row['cache_bytes'] / 1e9:.2f} "
            f"| {row['peak_bytes'] / 1e9:.2f} | {row['device']} |"
        )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["records"]))
    origin = f"`python -m experiments.decode`, one cell a command, {result['date']}, commits {commits}"
    return "\n".join([*lines, "", origin])


def passkeys() -> str:
    """Far passkeys of `experiments.passkey_long`, a row for each way of reading, depths side by side."""
    result = record.read("passkey_long")
    names = (
        *("trained_tokens", "trained_steps", "tokens", "kind", "window_sinks"),
        *("store", "route"),
        *("granularity", "answer_route", "answer_X"),
        *("answer_temperature_tokens", "answer_temperature_gain"),
        *("A", "beam", "device"),
    )
    lines = [
        "| trained on | steps | tokens | kind | sinks in windows | cache | route | read by | asked by | shortlist | sharper after | by | choices | beam | device | right, by depth | samples | ms a token | cache, GB |",
        "|---" * 19 + "|",
    ]
    by_cell = {}
    for row in sorted(result["records"], key=lambda row: row["depth"]):
        by_cell.setdefault(tuple(row[name] for name in names), []).append(row)
    for (trained, steps, tokens, *others), rows in sorted(by_cell.items()):
        right = ", ".join(f"{row['accuracy']:.0%} ({row['depth']:g})" for row in rows)
        # The first cell of a cache holds its compilation.
        timed = [row["ms_per_token"] for row in rows if row["ms_per_token"]]
        size = f"{rows[0]['cache_bytes'] / 1e9:.2f}"
        cells = [f"{trained:,}", steps, f"{tokens:,}", *others]
        cells += [right, rows[0]["samples"]]
        cells += [f"{min(timed):.1f}" if timed else "", size]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["records"]))
    origin = f"`python -m experiments.passkey_long --workdir=DIR`, one way of reading a command, {result['date']}, commits {commits}"
    return "\n".join([*lines, "", origin])


def speed() -> str:
    """How fast a published model reads and answers on a GPU, by `experiments.pretrained_speed`."""
    result = record.read("pretrained_speed")
    lines = [
        "| tokens | kind | route | tokens a call | read, tokens a second | ms a token | cache, GB | device |",
        "|---" * 8 + "|",
    ]
    rows = [row for row in result["records"] if "tokens_a_call" in row]
    for row in sorted(rows, key=lambda row: (-row["tokens_a_call"], row["tokens"])):
        lines.append(
            f"| {row['tokens']:,} | {row['kind']} | {row['route']} | {row['tokens_a_call'] or 'by layers'} "
            f"| {row['prefill_tokens_per_s']:,.0f} | {row['ms_per_token']:.1f} | {row['cache_bytes'] / 1e9:.2f} | {row['device']} |"
        )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    command = "python -m experiments.pretrained_speed --forwards=0 --steps=24"
    origin = f"`{command}`, others as the rows say, {result['date']}, commits {commits}"
    return "\n".join([*lines, "", origin])


PRETRAINED_BUDGET = 832
TABLES = {
    "glance": glance.table,
    "small": small,
    "recall": functools.partial(suite, "mqar"),
    "hops": functools.partial(suite, "hops"),
    "text": functools.partial(suite, "lm", "bits_per_byte"),
    "needles": functools.partial(suite, "needles"),
    "needles_small": functools.partial(suite, "needles_small"),
    "ablations": functools.partial(suite, "ablations"),
    "train_1m": train_1m,
    "context_parallel": context_parallel,
    "pretrained": pretrained,
    "speed": speed,
    "kernels": kernels,
    "triton": triton,
    "decode": decode,
    "passkeys": passkeys,
}


def filled(text: str) -> str:
    """A text with the table that follows each of its comments made anew.

    Raises:
        ValueError: a comment names no table, or its end is missing.
    """
    before, *parts = text.split("<!-- table:")
    made = [before]
    for part in parts:
        name, _, rest = part.partition(" -->")
        _, has_end, after = rest.partition(f"<!-- end:{name} -->")
        if name not in TABLES or not has_end:
            raise ValueError(f"table:{name} is not known, or has no end:{name}")
        made.append(f"{name} -->\n{TABLES[name]()}\n<!-- end:{name} -->{after}")
    return "<!-- table:".join(made)


def main() -> None:
    """Rewrites the files, or with --check only says whether they are up to date."""
    for file in FILES:
        old = file.read_text(encoding="utf-8")
        new = filled(old)
        if sys.argv[1:] != ["--check"]:
            file.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{file.name} is not what {__spec__.name} writes")


if __name__ == "__main__":
    main()
