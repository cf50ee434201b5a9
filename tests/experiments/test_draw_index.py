"""The drawing of a text shows its own words, earlier parents and all chapters."""

import json
import re
import subprocess
import sys

import numpy as np

from experiments import draw_index
from tests.experiments.test_index_recall import ROOT

TEXT = "A cat sat. Tom is a cat; Tom, from Egypt, is an Egyptian cat. " * 5


def test_page_of_a_text(tmp_path):
    keys = np.random.default_rng(0).normal(size=(len(TEXT), 2, 8))
    text_T = np.frombuffer(TEXT.encode(), np.uint8)
    np.savez(tmp_path / "cats.npz", k_TGK=keys, text_T=text_T)
    command = [sys.executable, "-m", "experiments.draw_index", "--chapter=4"]
    command += [f"--keys={tmp_path / 'cats.npz'}", f"--results={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "index_cats.html").read_text()
    data = re.search(r'id="data">(.*)</script>', page).group(1)
    bookmarks = json.loads(data)
    assert "".join(b["passage"] for b in bookmarks) == TEXT[: len(TEXT) // 16 * 16]
    words = set(re.findall(r"\w+", TEXT)) | {".", ";", ",", "␣"}
    for m, bookmark in enumerate(bookmarks):
        assert bookmark["quote"] in words
        assert all(parent["id"] < m for parent in bookmark["parents"])
    assert page.count("<details>") == len(bookmarks) // 4 + len(bookmarks) // 16
    assert (tmp_path / "index_cats.png").stat().st_size > 10_000


def test_word_of_a_token():
    pieces = ["An", " Egypt", "ian", " cat", ".", " "]
    words = [draw_index.word_at(pieces, token) for token in range(-1, len(pieces))]
    assert words == ["", "An", "Egyptian", "Egyptian", "cat", ".", "␣"]
