"""Training steps on a million tokens: how fast, in how much memory, and beside dense attention where that fits.

    python -m experiments.train_1m [--tokens=131072,1048576] [--kinds=bookmark,dense] [--steps=20] [--config.data.source=stdlib]

Each row is a process of its own, so that its peak of memory is its own. Where the time goes: --config.profile of
`bsa.main` traces the same step.
"""

import json
import subprocess
import sys
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from bsa.parallel import mesh as meshes
from bsa.tasks import pipeline, sources
from bsa.train import provenance, settings, step
from experiments import record

_CONFIG = config_flags.DEFINE_config_file("config", "configs/1m.py")
_TOKENS = flags.DEFINE_list("tokens", ["131072", "1048576"], "Lengths of the row.")
_KINDS = flags.DEFINE_list("kinds", ["bookmark", "dense"], "The fourth layer of four.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps; the first two are not timed.")
_ONE = flags.DEFINE_bool("one", False, "Measure one row here, and print it as JSON.")


def measure(config, tokens: int, kind: str, steps: int) -> dict:
    """One row: a fresh model trained on rows of `tokens`, all of them in the last stage."""
    config.data.update(T=tokens, curriculum=())
    config.evaluation.passkey_tokens = (tokens,)
    config.train.update(steps=steps, warmup_steps=steps // 4, learning_rate=1e-3)
    if kind == "dense":
        config.model.pattern = config.model.pattern.replace("b", "d")
    run = settings.from_config(config)
    mesh = meshes.make_mesh(run.mesh)
    batches = iter(pipeline.train_batches(sources.open_corpus(run.data), run.data))
    state, train_step = step.initial_state(run, mesh), step.make_train_step(run, mesh)
    losses = []
    for number in range(steps):
        state, figures = train_step(state, meshes.global_batch(mesh, next(batches)))
        losses.append(float(figures["loss"]))  # waits for the step
        if number == 1:
            began = time.monotonic()
    batches.close()
    rate = (steps - 2) * run.data.B * tokens / (time.monotonic() - began)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "layers": run.model.L,
        "tokens": tokens,
        "kind": kind,
        "attended_tokens": float(figures["attended_tokens"]),
        "tokens_per_s": rate,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def main(argv: list[str]) -> None:
    """Measures one row, or starts a process for each, and records them."""
    if _ONE.value:
        [tokens], [kind] = map(int, _TOKENS.value), _KINDS.value
        print(json.dumps(measure(_CONFIG.value, tokens, kind, _STEPS.value)))
        return
    rows = []
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
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    record.write("train_1m", provenance.provenance(), rows)


if __name__ == "__main__":
    app.run(main)
