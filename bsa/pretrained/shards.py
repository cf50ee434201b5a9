"""Safetensors files of a folder to tensors by name. Called by `checkpoint`."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def open_folder(folder: pathlib.Path) -> Callable[[str], np.ndarray]:
    """Finds the files of a checkpoint; a tensor is read when asked for.

    Returns:
        A function from a tensor's name to its array, in float32.
    Raises:
        ValueError: there is neither an index nor a whole file, or the file cannot be read; the function: the tensor is
            in no file, or its file is missing or corrupt.
    """
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = index["weight_map"]
    else:
        files = dict.fromkeys(_names(folder / WHOLE), WHOLE)

    def read(name: str) -> np.ndarray:
        if name not in files:
            raise ValueError(f"pretrained: {folder} has no tensor {name}")
        path = folder / files[name]
        try:
            # "flax" gives JAX arrays, which know bfloat16.
            with safetensors.safe_open(path, framework="flax") as shard:
                return np.asarray(shard.get_tensor(name), np.float32)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"pretrained: tensor {name} cannot be read from {path}: {error}"
            ) from error

    return read


def _names(path):
    try:
        with safetensors.safe_open(path, framework="flax") as shard:
            return shard.keys()
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"pretrained: {path} cannot be read: {error}") from error
