"""Training steps on a million tokens: how fast, in how much memory, and beside dense attention where that fits.

    python -m experiments.train_1m [--tokens=131072,1048576] [--kinds=bookmark,mixed,dense] [--steps=20] [--trace_dir=DIR]

`mixed` has dense layers in place of bookmark layers, between the same windows; in `dense` every layer is. Each row is a
process of its own, so that its peak of memory is its own; rows measured before on the same device stay. With --trace_dir
a row says in milliseconds of one step where the time goes.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
from absl import app, flags
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure
from ml_collections import config_flags

from bsa.parallel import mesh as meshes
from bsa.tasks import pipeline, sources
from bsa.train import provenance, settings, step
from experiments import record, step_parts

_CONFIG = config_flags.DEFINE_config_file("config", "configs/1m.py")
_TOKENS = flags.DEFINE_list("tokens", ["131072", "1048576"], "Lengths of the row.")
_KINDS = flags.DEFINE_list("kinds", ["bookmark", "mixed", "dense"], "Kinds of layers.")
_STEPS = flags.DEFINE_integer(
    "steps", 20, "Steps; the first two are not timed.", lower_bound=3
)
_TRACE_DIR = flags.DEFINE_string("trace_dir", "", "For traces; none if empty.")
_ONE = flags.DEFINE_bool("one", False, "Measure one row here, and print it as JSON.")

CELL = ("device", "tokens", "kind", "choices")


def measure(config, tokens: int, kind: str, steps: int) -> dict:
    """One row: a fresh model trained on rows of `tokens` without passkeys, all of them in the last stage."""
    config.data.update(T=tokens, curriculum=(), passkey_share=0.0)
    config.evaluation.passkey_tokens = (tokens,)
    config.train.warmup_steps = 5
    if kind != "bookmark":
        mixed = config.model.pattern.replace("b", "d")
        config.model.pattern = mixed if kind == "mixed" else "d" * len(mixed)
    run = settings.from_config(config)
    mesh = meshes.make_mesh(run.mesh)
    batches = iter(pipeline.train_batches(sources.open_corpus(run.data), run.data))
    state, batch = step.initial_state(run, mesh), next(batches)
    batch = meshes.global_batch(mesh, batch)
    train_step = step.make_train_step(run, mesh).lower(state, batch).compile()
    losses, attended = [], []
    for number in range(steps):
        state, figures = train_step(state, batch)
        losses.append(float(figures["loss"]))  # waits for the step
        attended.append(float(figures["attended_tokens"]))
        if number == 1:
            began = time.monotonic()
        if number + 1 < steps:
            batch = meshes.global_batch(mesh, next(batches))
    rate = (steps - 2) * run.data.B * tokens / (time.monotonic() - began)
    batches.close()
    memory = jax.local_devices()[0].memory_stats() or {}
    if _TRACE_DIR.value:
        step_parts.trace(
            _trace_folder(tokens, kind),
            train_step,
            lambda: jax.block_until_ready(train_step(state, batch)),
        )
    return {
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "layers": run.model.L,
        "tokens": tokens,
        "kind": kind,
        "choices": run.model.index.A,
        "steps": steps,
        "attended_tokens": statistics.mean(attended),
        "tokens_per_s": rate,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _trace_folder(tokens, kind):
    return pathlib.Path(_TRACE_DIR.value) / f"{kind}_{tokens}"


def main(argv: list[str]) -> None:
    """Measures one row, or starts a process for each, and records them."""
    if _ONE.value:
        [tokens], [kind] = map(int, _TOKENS.value), _KINDS.value
        print(json.dumps(measure(_CONFIG.value, tokens, kind, _STEPS.value)))
        return
    for kind in _KINDS.value:
        for tokens in _TOKENS.value:
            one = ["--one", f"--kinds={kind}", f"--tokens={tokens}"]
            command = [
                sys.executable,
                "-m",
                "experiments.train_1m",
                *sys.argv[1:],
                *one,
            ]
            done = subprocess.run(
                command, check=False, stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                print(f"{kind} at {tokens} tokens failed: it may not fit", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            if _TRACE_DIR.value:
                parts = step_parts.milliseconds(_trace_folder(int(tokens), kind))
                row |= {f"ms_{part}": ms for part, ms in parts.items()}
            print(row, flush=True)
            record.merge("train_1m", provenance.provenance(), row, CELL)
    draw(record.read("train_1m")["records"], record.RESULTS / "train_1m.png")


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Tokens a second over length, and a bar for each row that was traced: nanoseconds of a token by part."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lines = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        name = f"{row['kind']}, {row['choices']} choices, {row['device']}"
        lines.setdefault(name, []).append((row["tokens"], row["tokens_per_s"]))
    for name, points in lines.items():
        left.plot(*zip(*points), ".-", label=name)
    left.set(
        xscale="log", yscale="log", xlabel="tokens of a row", ylabel="tokens a second"
    )
    left.legend(fontsize=7)
    traced = [row for row in rows if "ms_index" in row]
    begin = [0.0] * len(traced)
    for part in (*step_parts.PARTS, "other", "unnamed"):
        width = [1e6 * row[f"ms_{part}"] / row["tokens"] for row in traced]
        if any(width):
            names = [f"{row['kind']}\n{row['tokens']:,}" for row in traced]
            right.barh(names, width, left=begin, label=part)
            begin = [x + y for x, y in zip(begin, width)]
    right.set(xlabel="kernels' time of a token, ns")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main)
