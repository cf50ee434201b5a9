"""Batches hold every byte once, next tokens as targets, documents apart."""

import itertools
from collections import Counter

import numpy as np

from bsa.tasks import pieces as pieces_lib
from bsa.tasks import pipeline, split


def texts_of(batches):
    """The packed texts of batches, row by row, after checking the promises of each."""
    for batch in batches:
        assert {name: array.dtype.name for name, array in batch.items()} == {
            "token_BT": "int32",
            "target_BT": "int32",
            "weight_BT": "float32",
            "segment_id_BT": "int32",
            "position_BT": "int32",
        }
        for row in range(len(batch["token_BT"])):
            token, target, weight, segment, position = (
                array[row] for array in batch.values()
            )
            num_real = int(weight.sum())
            assert (weight == (np.arange(len(weight)) < num_real)).all()
            assert (segment > 0).tolist() == (weight > 0).tolist()
            for array in (token, target, position):
                assert not array[num_real:].any()
            for segment_id in range(1, segment.max() + 1):
                (at,) = np.nonzero(segment == segment_id)
                assert (position[at] == np.arange(len(at))).all()
                assert (np.diff(at) == 1).all()
                assert (token[at][1:] == target[at][:-1]).all()
                yield bytes([*token[at].tolist(), int(target[at][-1])])


def predictions(texts):
    """How often each byte is predicted after each other byte."""
    return Counter(pair for text in texts for pair in itertools.pairwise(text))


def side(corpus, documents, percent, heldout):
    return [
        documents[name]
        for name in corpus.names
        if split.heldout(name, percent) == heldout
    ]


def test_pieces_predict_every_byte_once(open_documents, random_documents):
    corpus = open_documents(random_documents)
    pieces = pieces_lib.Pieces(corpus, np.flatnonzero(corpus.sizes >= 2), 64)
    texts = [bytes(piece) for piece in pieces]
    assert all(2 <= len(text) <= 65 for text in texts)
    assert predictions(texts) == predictions(random_documents.values())
    assert sorted(pieces.spread_order()) == list(range(len(pieces)))


def test_an_epoch_is_every_piece_once(open_documents, random_documents, make_settings):
    corpus = open_documents(random_documents)
    # One bin keeps rows in the order of the texts, so that epochs end cleanly.
    settings = make_settings(packing_bins=1)
    expected = predictions(side(corpus, random_documents, 50, heldout=False))
    train_ids, _ = split.split(corpus, 50)
    num_pieces = len(pieces_lib.Pieces(corpus, train_ids, settings.T))
    texts = texts_of(pipeline.train_batches(corpus, settings))
    epochs = [list(itertools.islice(texts, num_pieces)) for _ in range(3)]
    for epoch in epochs:
        assert predictions(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2]


def test_heldout_is_every_byte_once_whatever_the_seed(
    open_documents, random_documents, make_settings
):
    corpus = open_documents(random_documents)
    settings = make_settings(B=6)
    expected = predictions(side(corpus, random_documents, 50, heldout=True))
    whole = list(pipeline.heldout_batches(corpus, settings, 100))
    assert predictions(texts_of(whole)) == expected
    again = list(pipeline.heldout_batches(corpus, make_settings(B=6, seed=9), 100))
    for batch, same in zip(whole, again, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(same[name], array)
    few = list(pipeline.heldout_batches(corpus, settings, 2))
    assert len(few) == 2
    assert (few[1]["token_BT"] == whole[1]["token_BT"]).all()


def test_no_document_on_both_sides(open_documents, make_settings):
    documents = {f"{i}.txt": bytes([i]) * (7 * i) for i in range(1, 100)}
    corpus = open_documents(documents)
    settings = make_settings(passkey_share=0.3, T=160)
    train = itertools.islice(pipeline.train_batches(corpus, settings), 200)
    train_bytes = {byte for text in texts_of(train) for byte in text}
    heldout = pipeline.heldout_batches(corpus, settings, 100)
    heldout_bytes = {byte for text in texts_of(heldout) for byte in text}
    names = {b: f"{b}.txt" for b in range(1, 100)}
    assert heldout_bytes == {b for b, n in names.items() if split.heldout(n, 50)}
    words = set(b" The pass key is. Remember it. What is the pass key?0123456789")
    assert train_bytes - words == set(names) - heldout_bytes - words


def test_cross_document_rows_are_one_segment(
    open_documents, random_documents, make_settings
):
    corpus = open_documents(random_documents)
    apart = pipeline.train_batches(corpus, make_settings())
    joined = pipeline.train_batches(corpus, make_settings(cross_document=True))
    for a, b in itertools.islice(zip(apart, joined), 20):
        for name in ("token_BT", "target_BT", "weight_BT"):
            assert (a[name] == b[name]).all()
        real = b["weight_BT"] > 0
        assert (b["segment_id_BT"] == real).all()
        assert (b["position_BT"] == np.arange(64) * real).all()


def test_passkeys_mix_in_by_weight(open_documents, random_documents, make_settings):
    corpus = open_documents(random_documents)
    settings = make_settings(passkey_share=0.25, T=512)
    rows = itertools.islice(pipeline.train_batches(corpus, settings), 150)
    texts = list(texts_of(rows))
    asked = [text for text in texts if b" What is the pass key? The pass" in text]
    assert 0.2 < len(asked) / len(texts) < 0.3
    lengths = np.array([len(text) - 1 for text in asked])
    assert 112 <= lengths.min() < 130 and 450 < lengths.max() <= 512
    depths = np.array([t.index(b" The pass key is") / (len(t) - 104) for t in asked])
    assert 0.4 < np.mean(depths) < 0.6
    assert 0.02 < np.mean(depths == 0) < 0.2  # Begins its document.
    # Log-uniform: half of the documents are shorter than the geometric middle.
    assert 0.35 < np.mean(lengths < (112 * 512) ** 0.5) < 0.65
