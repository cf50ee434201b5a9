"""Where a number came from: the command, commit, day, device and versions behind it. Called by `evaluate` and experiments."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")


def provenance() -> dict:
    """Facts to write beside a result, all of them strings but `versions`.

    `commit` is that of the source tree, with `-dirty` if it has changes; where the tree was copied without its history,
    the environment variable BSA_COMMIT may name it, else it is "unknown".
    """
    device = jax.devices()[0]
    kind = (
        f"CPU ({platform.machine()})"
        if device.platform == "cpu"
        else device.device_kind
    )
    return {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.device_count()} x {kind}",
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in PACKAGES},
    }


def _module():
    """The module that was run, as `python -m` names it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else pathlib.Path(sys.argv[0]).stem


def _commit():
    root = pathlib.Path(__file__).parents[2]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BSA_COMMIT", "unknown")
    return described.stdout.strip()
