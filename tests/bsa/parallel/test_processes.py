"""Two real processes train as one does; when one is killed the other ends too, and the run goes on with other devices."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from bsa.parallel import mesh
from bsa.train import checkpoint

ROOT = pathlib.Path(__file__).parents[3]
SMALL = {
    "model.D": 16,
    "model.F": 16,
    "model.L": 1,
    "model.K": 8,
    "model.pattern": "b",
    "model.positions": "r",
    "model.window_tokens": "(16,)",
    "index.J": 16,
    "index.A": 8,  # all blocks: rounding never decides between two of them
    "data.B": 2,
    "data.T": 128,
    "data.passkey_min_tokens": 128,
    "train.steps": 400,
    "train.warmup_steps": 2,
    "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 4,
    "train.evaluate_every_steps": 400,
    "evaluation.passkey_tokens": "(128,)",
}
DEADLINE_S = 600


def start(workdir, devices, cluster=None):
    """A run on virtual devices, all of which share each row."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if cluster:
        env |= {f"JAX_{name}": str(value) for name, value in cluster.items()}
        devices *= cluster["NUM_PROCESSES"]
    knobs = SMALL | {"mesh.context": devices}
    command = [sys.executable, "-m", "bsa.main", f"--workdir={workdir}"]
    command += [f"--config={ROOT}/configs/tiny.py"]
    command += [f"--config.{name}={value}" for name, value in knobs.items()]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def losses(workdir):
    """Step to loss, as far as the run has come."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for(condition, *processes):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def stop_after(workdir, process, step):
    """Ends a run, with a checkpoint, some time after a step."""
    wait_for(lambda: max(losses(workdir), default=0) >= step, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0


def test_a_run_goes_on_with_other_devices(tmp_path):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cluster = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": 2}
    two = [start(changing, 1, cluster | {"PROCESS_ID": i}) for i in range(2)]
    try:
        saved = changing / "checkpoints" / "4" / checkpoint.COMMIT_MARK
        wait_for(lambda: saved.exists() and max(losses(changing)) >= 6, *two)
        two[1].kill()
        killed = time.monotonic()
        assert two[0].wait(DEADLINE_S) != 0
        assert time.monotonic() - killed < 2 * mesh.HEARTBEAT_S
    finally:
        for process in two:
            process.kill()

    before = max(losses(changing))
    stop_after(changing, start(changing, 1), before + 2)
    before = max(losses(changing))
    stop_after(changing, start(changing, 4), before + 2)
    last = max(losses(changing))
    stop_after(whole, start(whole, 1), last)

    expected, found = losses(whole), losses(changing)
    assert list(found) == list(range(1, last + 1))
    np.testing.assert_allclose(
        list(found.values()), [expected[step] for step in found], rtol=2e-4
    )
