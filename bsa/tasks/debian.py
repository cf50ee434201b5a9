"""Long texts out of Debian packages, as files in a cache outside the repository. Called by `sources`.

The cache is the folder that BSA_CACHE names, ~/.cache/bsa by default; on a machine without `apt-get`, put a package's
.deb or the whole folder there. Packages are read as they are, nothing of them is installed or run.
"""

import collections
import io
import os
import pathlib
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

from absl import logging

PART_BYTES = 2**20 + 1
"""Of set.mm, which is one work: a row of a million tokens and its last target, so that parts can be held out."""


def folder(name: str) -> pathlib.Path:
    """The folder that holds a corpus's documents as files; fetches and unpacks it if the cache lacks it.

    Args:
        name: `setmm`, Metamath's theorems without their compressed proofs (25 MB, CC0), in parts of `PART_BYTES`; or
            `go`, Go 1.19's sources (63 MB, BSD), one document a package folder, its files in order of names.
    Raises:
        OSError: it can neither be found nor downloaded.
    """
    package, documents = CORPORA[name]
    target = cache() / name
    if target.is_dir():
        return target
    archive = fetch(package)
    with tempfile.TemporaryDirectory(dir=cache()) as unfinished:
        made = pathlib.Path(unfinished) / name
        for document, text in documents(archive):
            path = made / document
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        try:
            made.rename(target)
        except OSError:  # another process was quicker
            if not target.is_dir():
                raise
    return target


def cache() -> pathlib.Path:
    """The folder of packages and texts; made if missing."""
    path = pathlib.Path(os.environ.get("BSA_CACHE", "~/.cache/bsa"))
    path = path.expanduser() / "texts"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(package: str) -> pathlib.Path:
    """The package's .deb in the cache; downloaded if it is not there.

    Raises:
        OSError: it cannot be downloaded.
    """
    found = sorted(cache().glob(f"{package}_*.deb"))
    if found:
        return found[0]
    logging.info("downloading Debian's %s into %s", package, cache())
    with tempfile.TemporaryDirectory(dir=cache()) as unfinished:
        try:
            command = ["apt-get", "download", package]
            subprocess.run(
                command, cwd=unfinished, check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise OSError(
                f"data: `apt-get download {package}` failed; put the .deb of Debian 12 into {cache()}, or use"
                " --config.data.source=stdlib"
            ) from error
        [path] = pathlib.Path(unfinished).glob("*.deb")
        return path.rename(cache() / path.name)


def members(archive: pathlib.Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the files of a .deb whose paths match a pattern, in its own order.

    A .deb is an ar archive: after 8 bytes come members, each with a header of 60 bytes that holds its name and, at 48,
    its size; one of them is data.tar, compressed in one way or another (deb(5)).
    """
    data = archive.read_bytes()
    at = 8
    while at < len(data):
        size = int(data[at + 48 : at + 58])
        if data[at : at + 8] == b"data.tar":
            content = io.BytesIO(data[at + 60 : at + 60 + size])
            with tarfile.open(fileobj=content, mode="r|*") as files:
                for file in files:
                    if file.isfile() and re.search(wanted, file.name):
                        yield file.name, files.extractfile(file).read()
            return
        at += 60 + size + size % 2


def _setmm(archive):
    """Proofs list the theorems that they use; the compressed steps after the list, near-random letters, are left out."""
    [(_, text)] = members(archive, r"/set\.mm$")
    text = re.sub(rb"(\$=\s*\([^)]*\))[A-Z?\s]+\$\.", rb"\1 $.", text)
    for number, start in enumerate(range(0, len(text), PART_BYTES)):
        yield f"set.mm.{number:02}", text[start : start + PART_BYTES]


def _go(archive):
    """Packages as documents: their files refer to each other."""
    packages = collections.defaultdict(list)
    for name, text in sorted(members(archive, r"/src/.*\.go$")):
        inside = name.partition("/src/")[2]
        packages[pathlib.PurePosixPath(inside).parent].append(text)
    for package, texts in packages.items():
        yield f"{package}/package.go", b"\n".join(texts)


CORPORA = {
    "setmm": ("metamath-databases", _setmm),
    "go": ("golang-1.19-src", _go),
}
"""By name: the Debian package, and the documents of its archive."""
