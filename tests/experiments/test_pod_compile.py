"""A train step compiled for TPUs without any: it fits or is refused, and what is sent is counted."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import collectives

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "model.D": 128,
    "model.H": 2,
    "model.G": 1,
    "model.F": 256,
    "model.L": 1,
    "model.pattern": "w",
    "model.positions": "r",
    "model.window_tokens": "(32,)",
    "model.mlp_tokens": 0,
    "index.sink_tokens": 16,
    "data.B": 2,
    "data.T": 2048,
    "evaluation.passkey_tokens": "(2048,)",
    "evaluation.passkey_samples": 2,
    "mesh.context": 2,
    "mesh.capacity_blocks": 0,
}


def compile_on(topology, **knobs):
    knobs = {f"--config.{name}": value for name, value in (SMALL | knobs).items()}
    return subprocess.run(
        [sys.executable, "-m", "experiments.pod_compile", f"--topology={topology}"]
        + [f"{name}={value}" for name, value in knobs.items()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_a_small_step_fits_and_a_row_too_many_does_not():
    done = compile_on("v5e:2x2")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["chips"] == 4 and 0 < row["peak_bytes"] < 2**30
    # Of each block that is fetched: forward, again for backward, and its gradient back.
    assert row["collective-permute_count"] >= 3
    refused = compile_on("v5e:2x2", **{"mesh.fsdp": 3})
    assert refused.returncode == 1 and "does not fit" in refused.stderr


HLO = """HloModule step

%body (arg: (f32[8])) -> (f32[8]) {
  %arg = (f32[8]) parameter(0)
  %permute = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%x)
  %sum = f32[16] all-reduce(%y), to_apply=%add
}

%condition (arg: (f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%a, %limit), direction=LT
}

%rounds (arg: (f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (f32[8]) while(%t), condition=%condition, body=%body
  %more = (f32[8]) while(%t), condition=%rounds, body=%body
  %told = (f32[8]) while(%t), condition=%rounds, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %gather = (f32[8]{0}, s32[2]) all-gather(%p, %q), dimensions={0}
}
"""


def test_what_is_sent_is_counted_as_often_as_loops_run():
    assert collectives.count(HLO) == {
        "all-gather": (1, 40),
        "all-reduce": (9, 9 * 64),
        "collective-permute": (9, 9 * 64),
    }
