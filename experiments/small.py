"""Bookmark, window and dense attention trained alike: bits by position, and passkeys over length and depth.

Command: python -m experiments.small --workdir=runs/small [--kinds=bookmark,window,dense] [--config.train.steps=1000 ...]
Trains what is not yet in the workdir (a run that was interrupted goes on), then collects all that is there into
experiments/results/small.json and small.png. One H100: about 4 minutes for each kind.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from configs import small
from experiments import record

_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/small", "One folder a kind is kept here."
)
_KINDS = flags.DEFINE_list(
    "kinds",
    list(small.ARGUMENTS),
    "What to train; kinds trained before are collected too.",
)
COLORS = {"bookmark": "#1f5fa8", "window": "#d9661f", "dense": "#8a8f98"}


def main(argv: list[str]) -> None:
    """Trains and collects; arguments that are not its own go to `bsa.main`."""
    workdir = pathlib.Path(_WORKDIR.value)
    for kind in _KINDS.value:
        if not (workdir / kind / "evaluation.json").exists():
            command = [
                f"--config=configs/small.py:{kind}",
                f"--workdir={workdir / kind}",
                *argv[1:],
            ]
            subprocess.run([sys.executable, "-m", "bsa.main", *command], check=True)
    collect(workdir)


def collect(workdir: pathlib.Path, folder: pathlib.Path = record.RESULTS) -> None:
    """Evaluations in workdir to records `kind, metric, first, last, depth, value, samples` and a figure."""
    found = {
        kind: json.loads((workdir / kind / "evaluation.json").read_text())
        for kind in small.ARGUMENTS
        if (workdir / kind / "evaluation.json").exists()
    }
    if not found:
        raise FileNotFoundError(f"{workdir} holds no evaluation; train a kind first")
    records = [
        row for kind, evaluation in found.items() for row in rows(kind, evaluation)
    ]
    record.write("small", next(iter(found.values()))["provenance"], records, folder)
    draw(found, folder / "small.png")


def rows(kind: str, evaluation: dict) -> list[dict]:
    """One kind's flat records; `first` and `last` are positions or the passkey document's length, in tokens."""
    empty = {"kind": kind, "first": None, "last": None, "depth": None, "samples": None}
    whole = ("bits_per_byte", "attended_tokens", "attended_share", "num_params")
    flat = [empty | {"metric": name, "value": evaluation[name]} for name in whole]
    flat += [
        empty
        | {
            "metric": "bits_at",
            "first": b["first"],
            "last": b["last"],
            "value": b["bits_per_byte"],
        }
        for b in evaluation["bits_per_byte_by_position"]
    ]
    return flat + [
        empty
        | {"metric": "passkey", "last": c["tokens"], "depth": c["depth"]}
        | {"samples": c["samples"], "value": c["accuracy"]}
        for c in evaluation["passkey_accuracy"]
    ]


def draw(found: dict, path: pathlib.Path) -> None:
    """Bits by position beside passkeys by length, a line for each kind."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind, evaluation in found.items():
        buckets = evaluation["bits_per_byte_by_position"]
        left.plot(
            [b["last"] for b in buckets],
            [b["bits_per_byte"] for b in buckets],
            ".-",
            color=COLORS[kind],
            label=kind,
        )
        lengths = sorted({c["tokens"] for c in evaluation["passkey_accuracy"]})
        cells = [
            [c["accuracy"] for c in evaluation["passkey_accuracy"] if c["tokens"] == n]
            for n in lengths
        ]
        right.plot(
            lengths,
            [sum(c) / len(c) for c in cells],
            ".-",
            color=COLORS[kind],
            label=kind,
        )
    left.set(xscale="log", xlabel="position (tokens)", ylabel="held-out bits per byte")
    right.set(
        xscale="log",
        xlabel="document (tokens)",
        ylabel="passkeys recalled, mean over depth",
        ylim=(0, 1.05),
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
