"""A published checkpoint is evaluated and asked as it is, and with its attention swapped."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bsa.decode import command, vocabulary
from bsa.model import decoder
from bsa.parallel import mesh as meshes
from bsa.pretrained import architecture, checkpoint, gguf_file, parameters
from bsa.tasks import sources
from bsa.train import settings, transfer
from configs import smollm2
from tests.bsa.pretrained import checkpoints

ROOT = pathlib.Path(__file__).parents[3]
T = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny qwen3 over bytes with its tokenizer, and two texts, one of them too short."""
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.write(checkpoints.config("qwen3") | {"vocab_size": 256}, folder)
    tokens = sorted(gguf_file.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = gguf_file.make_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [1] * len(tokens),
        }
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    text = pathlib.Path(__file__).read_bytes()
    (folder / "long.txt").write_bytes(text)
    (folder / "short.txt").write_bytes(text[:T])
    return folder


def run_of(folder, pattern="d", kept_layers=(), **index):
    config = smollm2.get_config()
    config.pretrained.update(source=str(folder), kept_layers=kept_layers)
    config.model.update(pattern=pattern, window_tokens=(8,))
    config.index.update(C=4, query_block=8, J=16, sink_tokens=4, X=0, A=1, R=2)
    config.index.update(index)
    config.data.update(T=T, source=f"files:{folder}/*.txt", passkey_min_tokens=0)
    config.data.update(passkey_share=0.0)
    config.evaluation.update(passkey_tokens=(T,), batches=2)
    return settings.from_config(config)


def evaluate(folder, run, workdir):
    run, opened = transfer.open_model(run)
    corpus, mesh = sources.open_corpus(run.data), meshes.make_mesh(run.mesh)
    return transfer.evaluate_model(run, opened, corpus, mesh, workdir)


def test_kept_layers_are_as_they_were_trained(folder, tmp_path):
    dense = evaluate(folder, run_of(folder), tmp_path)
    assert dense["documents"] == ["long.txt"], "the other has too few tokens"
    buckets = dense["nats_by_position"]
    assert sum(bucket["tokens"] for bucket in buckets) == T
    mean = np.average(
        [b["nats"] for b in buckets], weights=[b["tokens"] for b in buckets]
    )
    assert np.isclose(mean, dense["nats_per_token"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == dense
    kept = evaluate(folder, run_of(folder, "b", kept_layers=(0, 1)), tmp_path)
    assert kept["nats_per_token"] == dense["nats_per_token"]
    half = evaluate(folder, run_of(folder, "b", kept_layers=(1,)), tmp_path)
    assert half["nats_per_token"] != dense["nats_per_token"]
    assert half["attended_share"] < 1


def test_layers_follow_the_policy():
    config = checkpoints.config("mistral") | {"num_hidden_layers": 5}
    shape = architecture.from_config(config)
    assert shape.swapped("wb", (0, 3)) == "sbwsw"
    with pytest.raises(ValueError, match="are none of the layers 0 to 4"):
        shape.swapped("b", (5,))
    policy = run_of("anywhere", kept_layers=(0, 3)).pretrained
    with pytest.raises(ValueError, match="of no checkpoint"):
        dataclasses.replace(policy, source="")


def test_a_published_model_is_asked_in_its_own_words(folder, tmp_path):
    """The greedy answer of the parallel pass with room for all choices, until a string or an end that the checkpoint names; a saved book again."""
    text = (folder / "long.txt").read_text()[: 3 * T]
    (tmp_path / "book.txt").write_text(text)
    run = run_of(folder, "b")
    opened = checkpoint.open_checkpoint(str(folder))
    words = transfer.vocabulary_of(opened)
    model = transfer.fit(run, opened, 4 * T).model
    params = parameters.arrange(parameters.load(opened), model.pattern)

    def ask(words=words, load_cache="", save_cache="", **options):
        options = command.DEFAULTS | {"max_tokens": 12, "piece_tokens": 32} | options
        request = command.prepare(
            *(str(tmp_path / "book.txt"), options),
            question="Why?",
            words=words,
            load_cache=str(load_cache),
            save_cache=str(save_cache),
            page="",
        )
        with contextlib.redirect_stdout(io.StringIO()) as out:
            command.run(params, model, request)
        return out.getvalue().removesuffix("\n")

    tokens = words.begin(text) + words.go_on("Why?")
    asked = len(tokens)
    for _ in range(12):
        token_BT = jnp.pad(jnp.array([tokens]), ((0, 0), (0, -len(tokens) % 8)))
        place_BT = jnp.arange(token_BT.shape[1])[None]
        hidden, _ = decoder.apply(
            params, token_BT, jnp.ones_like(token_BT), place_BT, model.with_room()
        )
        logits_V = hidden[0, len(tokens) - 1] @ decoder.head(params).T
        tokens.append(int(logits_V.argmax()))
    expected = words.decode(tokens[asked:])
    saved = tmp_path / "book.npz"
    assert ask(save_cache=saved) == ask(load_cache=saved) == expected
    assert ask(tokens_a_call=0) == expected
    stop = next(x for x in expected if x != vocabulary.UNKNOWN)
    assert ask(stop=("never said", stop)) == expected[: expected.index(stop) + 1]
    ending = dataclasses.replace(words, end=(tokens[asked + 5],))
    first = tokens[asked:].index(tokens[asked + 5]) + 1
    assert ask(ending) == words.decode(tokens[asked : asked + first])


def test_a_published_model_answers_by_command(folder, tmp_path):
    """Without a workdir; its end of text is what its config says."""
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 8)
    line = [sys.executable, "-m", "bsa.main", f"--config={ROOT}/configs/smollm2.py"]
    line += ["--mode=generate", f"--prompt_file={tmp_path}/book.txt", "--question=Why?"]
    line += [f"--config.pretrained.source={folder}", "--decode.max_tokens=3"]
    done = subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("\n") and "ms a token" in done.stderr
    config = json.loads((folder / "config.json").read_text())
    for said, end in ((2, (2,)), ([3, 4], (3, 4)), (None, ())):
        config["eos_token_id"] = said
        (tmp_path / "config.json").write_text(json.dumps(config))
        for file in folder.glob("*.safetensors"):
            shutil.copy(file, tmp_path)
        assert checkpoint.open_checkpoint(str(tmp_path)).end == end


def test_training_it_is_refused_in_one_line(tmp_path):
    line = [sys.executable, "-m", "bsa.main", f"--config={ROOT}/configs/smollm2.py"]
    line += [f"--workdir={tmp_path}", "--mode=train"]
    done = subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("bsa: ")]
    assert "can be evaluated and asked, not trained; add --mode=evaluate" in line
