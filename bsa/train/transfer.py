"""A published checkpoint under a run's attention, without training: its sizes, its words, its nats per token. Called by `bsa.main`."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from absl import logging

from bsa.decode import vocabulary
from bsa.parallel import mesh as meshes
from bsa.pretrained import checkpoint as checkpoints
from bsa.pretrained import parameters
from bsa.tasks import corpus as corpus_lib
from bsa.train import evaluate, provenance, settings, step

BYTES_PER_TOKEN = 8
"""How much of a document is tokenised for each token wanted of it; more than text has."""


def open_model(
    run: settings.RunSettings,
) -> tuple[settings.RunSettings, checkpoints.Checkpoint]:
    """Opens the run's checkpoint, and gives the run its sizes, for rows of T tokens; see `fit`.

    Raises:
        ValueError, OSError: as `checkpoint.open_checkpoint` has it, or the layers do not fit.
    """
    opened = checkpoints.open_checkpoint(run.pretrained.source)
    return fit(run, opened, run.data.T), opened


def fit(
    run: settings.RunSettings, opened: checkpoints.Checkpoint, num_tokens: int
) -> settings.RunSettings:
    """The run with a checkpoint's sizes.

    What the config says of sizes, biases and positions gives way to the checkpoint; its pattern, window, index and dtype
    stay.

    Args:
        num_tokens: positions that go by the text's length are set up for so many.
    Raises:
        ValueError: the layers do not fit.
    """
    shape = opened.architecture
    layers = shape.swapped(run.model.pattern, run.pretrained.kept_layers)
    model = shape.settings(run.model, layers)
    scaling = model.rope_scaling
    if scaling.kind in ("dynamic", "longrope"):
        scaling = dataclasses.replace(scaling, tokens=num_tokens)
    model = dataclasses.replace(model, rope_scaling=scaling)
    if num_tokens > shape.max_tokens and scaling.kind == "none":
        logging.warning(
            "%d tokens for a model of %d, whose positions are not stretched",
            num_tokens,
            shape.max_tokens,
        )
    return dataclasses.replace(run, model=model)


def vocabulary_of(opened: checkpoints.Checkpoint) -> vocabulary.Vocabulary:
    """The words of a checkpoint, for `bsa.decode.command`.

    Raises:
        ValueError: as `Checkpoint.tokenizer` has it.
    """
    tokenizer = opened.tokenizer()
    return vocabulary.Vocabulary(
        lambda text: tokenizer.encode(text).ids,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda tokens: tokenizer.decode(list(tokens)),
        opened.end,
    )


def evaluate_model(
    run: settings.RunSettings,
    opened: checkpoints.Checkpoint,
    corpus: corpus_lib.Corpus,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
) -> dict:
    """Reads the first T tokens of documents that have as many, and writes workdir/evaluation.json.

    Args:
        run: as `open_model` gives it; `evaluation.batches` rows of B documents are read, if there are as many.
    Returns:
        `nats_per_token`, `nats_by_position` (a list of {first, last, nats, tokens}: positions in tokens, both ends
        included), `num_params`, `documents`, the attention layers' figures and `provenance`.
    Raises:
        ValueError: no document is long enough.
    """
    params = parameters.arrange(parameters.load(opened), run.model.pattern)
    starts = evaluate.bucket_starts(run.data.T, run.evaluation.position_buckets)
    evaluation_step = step.make_evaluation_step(run, mesh, starts)
    sums, names = [], []
    for names_B, batch in _batches(run, corpus, opened.tokenizer()):
        names += names_B
        batch = meshes.global_batch(mesh, batch)
        sums.append(jax.device_get(evaluation_step(params, batch)))
        logging.info("read %s", ", ".join(names_B))
    if not sums:
        raise ValueError(
            f"data: no document of {run.data.source!r} has {run.data.T + 1} tokens; lower data.T"
        )
    nats = np.sum([s.pop("nats") for s in sums], axis=0, dtype=np.float64)
    tokens = np.sum([s.pop("tokens") for s in sums], axis=0, dtype=np.float64)
    ends = [*starts[1:], run.data.T]
    result = {
        "nats_per_token": nats.sum() / tokens.sum(),
        "nats_by_position": [
            {"first": first, "last": end - 1, "nats": nat / num, "tokens": int(num)}
            for first, end, nat, num in zip(starts, ends, nats, tokens)
        ],
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "documents": names,
    }
    for name in sums[0].keys() - {"found"}:
        result[name] = float(np.mean([s[name] for s in sums]))
    result["provenance"] = provenance.provenance()
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary(result: dict, workdir: pathlib.Path) -> str:
    """The evaluation as a small table."""
    rows = [
        ("parameters", f"{result['num_params']:,}"),
        ("documents", str(len(result["documents"]))),
        ("nats per token", f"{result['nats_per_token']:.3f}"),
        ("share of tokens attended", f"{result['attended_share']:.3f}"),
    ]
    for bucket in result["nats_by_position"]:
        where = f"  at positions {bucket['first']:,}-{bucket['last']:,}"
        rows.append((where, f"{bucket['nats']:.3f}"))
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>12}" for name, value in rows)
    return f"result\n{table}\n  numbers in {workdir / 'evaluation.json'}"


def _batches(run, corpus, tokenizer):
    """(names of documents, batch of their first T tokens), whole batches only."""
    T, B = run.data.T, run.data.B
    ids_BT, names = [], []
    left = run.evaluation.batches
    for number, name in enumerate(corpus.names):
        size = min(int(corpus.sizes[number]), (T + 1) * BYTES_PER_TOKEN)
        if size <= T or not left:
            continue
        text = corpus.read(number, 0, size).decode("utf-8", errors="replace")
        ids = tokenizer.encode(text).ids[: T + 1]
        if len(ids) <= T:
            continue
        ids_BT.append(ids)
        names.append(name)
        if len(ids_BT) == B:
            yield names, _batch(np.array(ids_BT, np.int32))
            ids_BT, names = [], []
            left -= 1


def _batch(ids_BT):
    """Rows of T + 1 tokens as the compiled steps take them, one document each."""
    token_BT = ids_BT[:, :-1]
    position_T = np.arange(token_BT.shape[1], dtype=np.int32)
    return {
        "token_BT": token_BT,
        "target_BT": ids_BT[:, 1:],
        "weight_BT": np.ones(token_BT.shape, np.float32),
        "segment_id_BT": np.ones_like(token_BT),
        "position_BT": np.broadcast_to(position_T, token_BT.shape),
    }
