"""Passkeys in real text far longer than the rows that a model was trained on, over depth.

Command: python -m experiments.passkey_long --workdir=runs/small_bookmark [--tokens=1048576,10485760] [--depths=5]
    [--samples=50] [--batch=2] [--kinds=bookmark,window] [--stores=model,int8] [--route=chapters]
Hardware: one H100; the records say which
Output: experiments/results/passkey_long.json; cells measured before on the same device stay

`window` is the same parameters with the choices of bookmark layers taken away: they read sinks and window only. A sample
counts if all five digits, decoded greedily after the question, are right. Text is the held-out part of the run's own
source; where that is shorter than the document, pieces of it come again. `ms_per_token` is the median over batches. A cell
is written as soon as it is done.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bsa.decode import cache as caches
from bsa.decode import generate, step
from bsa.decode import settings as decode_settings
from bsa.model import decoder
from bsa.parallel import mesh as meshes
from bsa.tasks import passkey, sources, split
from bsa.train import loop, provenance, settings
from experiments import decode, record


def load(workdir):
    """Run settings of a workdir, and its parameters on one device."""
    text = (workdir / "config.json").read_text()
    kept = json.loads(
        text,
        object_hook=lambda values: {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        },
    )
    run = settings.from_config(ml_collections.ConfigDict(kept))
    params, _ = loop.restore_params(run, meshes.make_mesh(run.mesh), workdir)
    return run, jax.tree.map(jnp.asarray, jax.device_get(params))


def without_choices(params, model):
    """The same parameters in a model that has window layers in place of bookmark layers."""
    pattern = model.pattern.replace("b", "w").replace("f", "w")
    return decoder.renamed(params, pattern), dataclasses.replace(model, pattern=pattern)


def documents(run, tokens, depth, samples):
    """Prompts that end where the answer begins, and answers, both as rows of tokens."""
    corpus = sources.open_corpus(run.data)
    _, heldout_ids = split.split(corpus, run.data.heldout_percent)
    for sample in range(samples):
        text, answer = passkey.make_document(
            corpus,
            heldout_ids,
            num_tokens=tokens,
            depth=depth,
            rng=np.random.default_rng((tokens, sample)),
        )
        yield (
            np.frombuffer(text[: answer.start], np.uint8).astype(np.int32),
            np.frombuffer(text[answer], np.uint8).astype(np.int32),
        )


def measure(params, model, empty, prompts, answers):
    """How many of a batch are right, and ms a token of their answers."""
    # Not made anew: a step that was compiled for blocks on the host belongs to them.
    cache = jax.tree.map(jnp.copy, empty)
    _, cache = step.prefill(params, prompts[:, :-1], cache, model)
    jax.block_until_ready(cache)
    num = answers.shape[1]
    sampling = decode_settings.SamplingSettings(max_tokens=num, tokens_a_call=num)
    begin = time.perf_counter()
    stream = generate.stream(params, prompts[:, -1], cache, model, sampling)
    drawn = [drawn.token_B for drawn in stream]
    ms = 1000 * (time.perf_counter() - begin) / num
    right = int((np.stack(drawn, axis=1) == answers).all(1).sum())
    return right, ms


def cell(run, params, model, empty, tokens, depth, arguments):
    """Share of samples that were right, with time and bytes of the batches."""
    pairs = list(documents(run, tokens, depth, arguments.samples))
    right, ms = 0, []
    for begin in range(0, len(pairs), arguments.batch):
        batch = pairs[begin : begin + arguments.batch]
        prompts, answers = (np.stack(rows) for rows in zip(*batch))
        found, ms_per_token = measure(params, model, empty, prompts, answers)
        right += found
        ms.append(ms_per_token)
    return {
        "accuracy": right / len(pairs),
        "samples": len(pairs),
        "ms_per_token": float(np.median(ms)),
        "cache_bytes": caches.num_bytes(empty),
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", default="1048576,10485760")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--samples", type=int, default=50, help="whole batches")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--kinds", default="bookmark,window")
    parser.add_argument("--stores", default="model")
    parser.add_argument("--route", default="chapters")
    parser.add_argument("--piece", type=int, default=1024)
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.samples % arguments.batch:
        sys.exit(
            f"passkey_long: --samples={arguments.samples} are no whole batches of {arguments.batch}"
        )
    run, params = load(arguments.workdir.absolute())
    cells = ("device", "tokens", "depth", "kind", "store", "route")
    for tokens in map(int, arguments.tokens.split(",")):
        index = decode.long_index(run.model.index, tokens, arguments.route)
        model = dataclasses.replace(run.model, index=index)
        models = {"bookmark": (params, model), "window": without_choices(params, model)}
        for kind in arguments.kinds.split(","):
            for store in arguments.stores.split(","):
                room = decode_settings.CacheSettings(
                    tokens + 16, arguments.piece, store
                )
                empty = caches.empty(models[kind][1], room, arguments.batch)
                for depth in np.linspace(0, 1, arguments.depths).tolist():
                    row = {
                        "device": jax.devices()[0].device_kind,
                        "trained_tokens": run.data.T,
                        "tokens": tokens,
                        "depth": depth,
                        "kind": kind,
                        "store": store,
                        "route": arguments.route,
                    } | cell(run, *models[kind], empty, tokens, depth, arguments)
                    print(row, flush=True)
                    record.merge("passkey_long", provenance.provenance(), row, cells)


if __name__ == "__main__":
    main()
