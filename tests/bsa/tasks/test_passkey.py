"""Passkey documents are as promised at every length and depth."""

import numpy as np
import pytest

from bsa.tasks import passkey, pipeline


@pytest.fixture
def corpus(open_documents):
    """Documents of capitals only: filler is told from needle and question by eye."""
    rng = np.random.default_rng(1)
    return open_documents(
        {
            f"{i}.txt": rng.integers(65, 91, size, np.uint8).tobytes()
            for i, size in enumerate([5, 40, 300, 2000] * 4)
        }
    )


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("num_tokens", [passkey.MIN_TOKENS, 112, 257, 1024, 5000])
def test_text_is_as_promised(corpus, num_tokens, depth):
    text, answer = passkey.make_document(
        corpus,
        np.arange(len(corpus.names)),
        num_tokens=num_tokens,
        depth=depth,
        rng=np.random.default_rng(7),
    )
    assert len(text) == num_tokens + 1
    key = text[answer].decode()
    assert len(key) == 5 and key.isdigit() and key[0] != "0"
    needle = f" The pass key is {key}. Remember it. {key} is the pass key. ".encode()
    question = f" What is the pass key? The pass key is {key}.".encode()
    assert text.endswith(question)
    before, after = text.removesuffix(question).split(needle)
    filler = before + after
    assert not filler or filler.isupper()
    assert len(filler) == num_tokens + 1 - len(needle) - len(question)
    assert len(before) == round(depth * len(filler))
    assert (answer.start, answer.stop) == (len(text) - 6, len(text) - 1)


def test_generator_decides_key_and_filler_alike_at_every_depth(corpus):
    def make(seed, depth):
        text, answer = passkey.make_document(
            corpus,
            np.arange(len(corpus.names)),
            num_tokens=400,
            depth=depth,
            rng=np.random.default_rng(seed),
        )
        return text, text[answer], bytes(sorted(text))

    assert make(0, 0.3) == make(0, 0.3)
    assert make(0, 0.3)[1:] == make(0, 0.9)[1:]
    assert make(0, 0.3)[1] != make(1, 0.3)[1]


def test_impossible_documents_are_refused(corpus):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no room"):
        passkey.make_document(corpus, [0], num_tokens=20, depth=0.5, rng=rng)
    with pytest.raises(ValueError, match="depth=1.5"):
        passkey.make_document(corpus, [0], num_tokens=200, depth=1.5, rng=rng)


def test_evaluation_batch_weighs_the_digits_only(corpus, make_settings):
    settings = make_settings()
    batch = pipeline.passkey_batch(
        corpus, settings, num_tokens=300, depth=0.5, num_samples=6, seed=11
    )
    assert {array.shape for array in batch.values()} == {(6, 300)}
    assert (batch["weight_BT"].sum(axis=1) == 5).all()
    assert (batch["token_BT"][:, 1:] == batch["target_BT"][:, :-1]).all()
    assert (batch["position_BT"] == np.arange(300)).all()
    assert (batch["segment_id_BT"] == 1).all()
    keys = set()
    for row in range(6):
        answer = batch["target_BT"][row][batch["weight_BT"][row] == 1]
        key = bytes(answer.tolist())
        text = bytes(batch["target_BT"][row].tolist())
        assert text.count(b"The pass key is " + key + b".") == 2
        keys.add(key)
    assert len(keys) == 6
