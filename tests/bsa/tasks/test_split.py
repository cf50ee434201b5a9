"""The split hangs on names only."""

import numpy as np
import pytest

from bsa.tasks import corpus as corpus_lib
from bsa.tasks import split


def make_corpus(names):
    sizes = np.full(len(names), 10)
    return corpus_lib.Corpus(tuple(names), sizes, lambda i, start, stop: b"")


def heldout_names(names, percent=20):
    corpus = make_corpus(names)
    train_ids, heldout_ids = split.split(corpus, percent)
    assert sorted([*train_ids, *heldout_ids]) == list(range(len(names)))
    return {corpus.names[i] for i in heldout_ids}


def test_adding_removing_and_reordering_moves_nobody():
    names = [f"folder/{i}.txt" for i in range(200)]
    held = heldout_names(names)
    assert heldout_names(names[::-1]) == held
    assert heldout_names(names[50:]) == held & set(names[50:])
    assert held <= heldout_names([f"new/{i}.txt" for i in range(100)] + names)


def test_hash_stays_the_same_for_ever():
    assert split.hash_name("json/decoder.py") == 2101820494204920077
    assert split.hash_name("café\udcff.txt") == 11289848879923581637


def test_share_is_about_percent_and_grows_by_adding():
    names = [f"{i}" for i in range(5000)]
    held5, held10 = heldout_names(names, 5), heldout_names(names, 10)
    assert held5 < held10
    assert 400 < len(held10) < 600


def test_a_side_without_documents_is_an_error():
    names = [f"{i}" for i in range(100)]
    held = sorted(heldout_names(names))
    train = sorted(set(names) - set(held))
    with pytest.raises(ValueError, match="no training document: .*heldout_percent=20"):
        split.split(make_corpus(held), 20)
    with pytest.raises(ValueError, match="no held-out document: 1 documents"):
        split.split(make_corpus(train[:1]), 20)
