"""Passkeys lie where they should, in texts as long as asked; positions are stretched for the text's length."""

import numpy as np
import pytest

from bsa.pretrained import checkpoint, gguf_file
from experiments import extension, swapped
from tests.bsa.pretrained import checkpoints


@pytest.fixture(scope="module")
def tokenizer():
    tokens = sorted(gguf_file.pre_tokenizers.ByteLevel.alphabet())
    return gguf_file.make_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [1] * len(tokens),
        }
    )


@pytest.mark.parametrize("depth", extension.DEPTHS)
def test_a_passkey_lies_at_its_depth(tokenizer, depth):
    filler_T = np.array(tokenizer.encode("x" * 1025).ids)
    ids, answer = extension.hide(filler_T, tokenizer, depth, key=3)
    assert ids.shape == filler_T.shape and answer == 5
    text = tokenizer.decode(ids)
    digits = tokenizer.decode(ids[-answer:])
    assert digits.isdigit() and text.count(digits) == 3
    assert text.endswith(f"? The pass key is {digits}")
    assert np.isclose(text.index(" The pass") / text.count("x"), depth, atol=1e-3)
    shallow, _ = extension.hide(filler_T, tokenizer, 0.5, key=3)
    assert sorted(shallow) == sorted(ids), "the same key and filler at every depth"


def test_positions_are_stretched_for_the_texts_length(tmp_path):
    checkpoints.write(checkpoints.config("smollm2"), tmp_path)
    model = swapped.Model(checkpoint.open_checkpoint(str(tmp_path)))
    longest = checkpoints.BASE["max_position_embeddings"]

    def scaling(stretch, times):
        swap = swapped.Swap("d", stretch=stretch)
        return model.settings(swap, times * longest).rope_scaling

    assert scaling("", 4).kind == "none"
    assert (scaling("yarn", 4).factor, scaling("yarn", 4).trained_tokens) == (
        4,
        longest,
    )
    assert (scaling("ntk:2", 4).kind, scaling("ntk:2", 4).factor) == ("ntk", 8)
    dynamic = scaling("dynamic", 4)
    assert (dynamic.factor, dynamic.tokens) == (1, 4 * longest)


def test_cells_that_are_there_are_left_alone(tmp_path):
    cell = {"tokens": 64, "method": "dense", "stretch": ""}
    rows = [
        cell | {"depth": depth, "key": key} for key in range(4) for depth in (0.0, 1.0)
    ]
    missing = [(row["depth"], row["key"]) for row in extension.missing(cell, rows)]
    assert len(missing) == 1 + extension.KEYS * len(extension.DEPTHS) - len(rows)
    assert (0.0, 0) not in missing and (0.5, 3) in missing
    done = [row | {"nats": None, "found": 1.0} for row in rows]
    done.append(cell | {"depth": None, "key": None, "nats": 3.0, "found": None})
    extension.draw(done, tmp_path / "extension.png")
    assert (tmp_path / "extension.png").stat().st_size > 5_000
