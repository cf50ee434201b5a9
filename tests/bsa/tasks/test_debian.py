"""Long texts out of Debian packages, here out of small ones made on the spot."""

import io
import re
import tarfile

import pytest

from bsa.tasks import debian, sources

PROOF = b"th1 $p |- a $= ( ax-1 ax-mp ) ABCZZQ? AA\nBB $.\n"


def make_deb(path, files):
    """An ar archive with three members, as dpkg-deb makes them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd")]
    ar = b"!<arch>\n"
    for name, text in [*parts, ("data.tar.xz", data.getvalue())]:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(text):<10}`\n"
        ar += header.encode() + text + b"\n" * (len(text) % 2)
    path.write_bytes(ar)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BSA_CACHE", str(tmp_path))
    return debian.cache()


def read_all(make_settings, source):
    corpus = sources.open_corpus(make_settings(source=source))
    sizes = zip(corpus.names, corpus.sizes)
    return {name: corpus.read(i, 0, int(size)) for i, (name, size) in enumerate(sizes)}


def test_setmm_has_lists_of_references_but_no_compressed_steps(cache, make_settings):
    text = b"$( A comment. $)\n" + PROOF * 40_000
    files = {"./usr/share/metamath/set.mm": text, "./usr/share/metamath/x.mm": b"x"}
    make_deb(cache / "metamath-databases_0_all.deb", files)
    parts = read_all(make_settings, "setmm")
    assert list(parts) == ["set.mm.00", "set.mm.01"]
    whole = b"".join(parts.values())
    assert whole == b"$( A comment. $)\n" + (
        re.sub(rb" ABCZZQ\? AA\nBB", b"", PROOF) * 40_000
    )


def test_go_packages_are_documents(cache, make_settings):
    root = "./usr/share/go-1.19/src/"
    files = {root + "net/http/b.go": b"b", root + "net/http/a.go": b"a"}
    files |= {root + "net/net.go": b"package net", root + "net/README": b"no"}
    make_deb(cache / "golang-1.19-src_0_all.deb", files)
    expected = {"net/http/package.go": b"a\nb", "net/package.go": b"package net"}
    for _ in range(2):  # unpacked, then found
        assert read_all(make_settings, "go") == expected


def test_what_cannot_be_fetched_says_what_to_do(cache, monkeypatch, make_settings):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match=r"put the \.deb .*source=stdlib"):
        sources.open_corpus(make_settings(source="setmm"))
