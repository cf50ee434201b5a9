"""A cache to a file and back, bound to its model and its text. Called by `command`.

The file is NumPy's .npz without compression: arrays by their place in the cache, and a JSON record `made_of`. ZIP's
check sums tell a damaged file from a whole one.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile

import jax
import numpy as np

from bsa.decode import cache as caches
from bsa.decode import settings
from bsa.model import settings as model_settings

FORMAT = 2
"""Raised whenever the same name comes to mean something else."""

_DAMAGE = (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError)


def fingerprint(params, model: model_settings.ModelSettings) -> str:
    """SHA-256 of a model: its settings, but for those of backward and of speed, and its parameters."""
    model = dataclasses.replace(model, remat="none", implementation="auto")
    digest = hashlib.sha256(repr(model).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)))
    return digest.hexdigest()


def save(path, cache: caches.Cache, token_BT, fingerprint: str) -> None:
    """Writes the file at once: an older one stays whole until the new one is.

    Args:
        token_BT: the text in the cache, all rows equally long.
    """
    path = pathlib.Path(path)
    made_of = {
        "format": FORMAT,
        "model": fingerprint,
        "text": _text_hash(token_BT),
        "shape": list(np.shape(token_BT)),
        "room": dataclasses.asdict(cache.room),
    }
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        arrays = _named(jax.device_get(cache)) | _on_host(cache)
        with open(unfinished, "wb") as file:
            np.savez(file, made_of=json.dumps(made_of), **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(
    path, token_BT, model: model_settings.ModelSettings, fingerprint: str
) -> caches.Cache:
    """Reads a cache of the first tokens of a text.

    Args:
        token_BT: the text, at least as long as what is in the cache.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds the cache of another model or of another text.
    """
    try:
        file = np.load(path, allow_pickle=False)
        made_of = json.loads(str(file["made_of"]))
    except _DAMAGE as error:
        raise ValueError(f"{path} is no cache, or a damaged one: {error}") from error
    with file:
        _check(path, made_of, token_BT, fingerprint)
        room = settings.CacheSettings(**made_of["room"])
        template = jax.eval_shape(
            lambda: caches.empty(model, room, made_of["shape"][0])
        )
        try:
            arrays = [
                jax.device_put(file[name].view(leaf.dtype))
                for name, leaf in _named(template).items()
            ]
            for name, array in _on_host(template).items():
                array[...] = file[name].view(array.dtype)
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    structure = jax.tree.structure(template)
    return jax.tree.unflatten(structure, arrays)


def _check(path, made_of, token_BT, fingerprint):
    """Raises ValueError unless the file belongs to this model and text."""
    if made_of["format"] != FORMAT:
        raise ValueError(f"{path} has format {made_of['format']}, not {FORMAT}")
    if made_of["model"] != fingerprint:
        raise ValueError(f"{path} is the cache of another model; read the text anew")
    batch, length = made_of["shape"]
    if token_BT.shape[0] != batch or token_BT.shape[1] < length:
        raise ValueError(
            f"{path} holds {batch} texts of {length} tokens, more than the {token_BT.shape} given"
        )
    if made_of["text"] != _text_hash(token_BT[:, :length]):
        raise ValueError(f"{path} is the cache of another text; read this one anew")


def _text_hash(token_BT):
    return hashlib.sha256(np.ascontiguousarray(token_BT, np.int32)).hexdigest()


def _named(cache):
    """Arrays, or their shapes, by their path in the cache, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _on_host(cache):
    """The arrays that the host keeps, by name."""
    return {
        f".layers[{i}].host.{name}": getattr(layer.host, name)
        for i, layer in enumerate(cache.layers)
        if layer.host is not None
        for name in ("k_BGNCK", "v_BGNCK")
    }
