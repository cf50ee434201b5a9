"""A corpus: named documents of bytes. `sources` opens one; the other modules read it."""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents by number, read when they are asked for.

    Attributes:
        names: stable and unique; which side of the split a document is on hangs on it.
        sizes: int64, bytes of each document; at least 1.
        read: (document_id, start, stop) -> exactly the bytes [start, stop). Any thread
            may call it.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    read: Callable[[int, int, int], bytes]


def from_files(paths: Sequence[str], names: Sequence[str]) -> Corpus:
    """A corpus of files, in the order of their names; empty files are left out.

    Raises:
        OSError: a file cannot be read. A file that changes its size later raises when
            the missing part is read.
    """
    named = [
        (name, path, size)
        for name, path in sorted(zip(names, paths, strict=True))
        if (size := _size(path))
    ]
    files = [path for _, path, _ in named]

    def read(document_id: int, start: int, stop: int) -> bytes:
        with open(files[document_id], "rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        if len(text) != stop - start:
            raise OSError(
                f"data: {files[document_id]} was cut short while in use: it has no"
                f" {stop} bytes any more; restore it or start a new run"
            )
        return text

    sizes = np.array([size for _, _, size in named], np.int64)
    return Corpus(tuple(name for name, _, _ in named), sizes, read)


def _size(path: str) -> int:
    """Bytes of a file that opens."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise OSError(
            f"data: {path} cannot be read ({error.strerror}); make it readable or choose"
            " a source without it"
        ) from error
