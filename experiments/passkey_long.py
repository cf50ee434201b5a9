"""Passkeys in real text far longer than the rows that a model was trained on, over depth.

Command: python -m experiments.passkey_long --workdir=runs/small_bookmark [--tokens=1048576,10485760] [--depths=0,0.25,0.5,0.75,1]
    [--samples=50] [--batch=2] [--kinds=bookmark,window] [--stores=model,int8] [--route=chapters] [--choices=8] [--beam=16]
    [--granularity=block] [--answers=chapters,flat,flat:32,flat:256:16384:0.3]
Hardware: one H100; the records say which
Output: experiments/results/passkey_long.json; cells measured before on the same device stay

`window` is the same parameters with the choices of bookmark layers taken away: they read sinks and window only. A sample
counts if all five digits, decoded greedily after the question, are right. Text is the held-out part of the run's own
source; where that is shorter than the document, pieces of it come again. `ms_per_token` is the median over batches,
the lower one of two; in a store's first cell one batch waits for the compiler. A cell is written as soon as it is done.
`read_tokens_per_s`, over all rows of a batch, is the best of its batches. With `--granularity=block` the 16 tokens of a
query block choose together while the text is read; a token that answers always chooses for itself. A text is read once and
asked in each way of `--answers`: "flat" looks through all bookmarks for question and answer alone, whose tokens then choose
each for itself; in "flat:32" exact keys pick the blocks out of the 32 best; in "flat:256:16384:0.3" attention is sharper beyond
16,384 tokens, too, by 0.3 (`model.temperature_tokens`, `model.temperature_gain`).

Where a sample fails: `digits` is the share of single digits that are right, `key_read` the share of samples in which some
head of a bookmark layer reads a block of the key when the first digit is drawn, and `blocks_read` how many blocks such a
head reads on average, of the `J` that find room.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
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
    """Run settings of a workdir, its parameters on one device, and after how many steps."""
    text = (workdir / "config.json").read_text()
    kept = json.loads(
        text,
        object_hook=lambda values: {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        },
    )
    run = settings.from_config(ml_collections.ConfigDict(settings.complete(kept)))
    params, steps = loop.restore_params(run, meshes.make_mesh(run.mesh), workdir)
    return run, jax.tree.map(jnp.asarray, jax.device_get(params)), steps


def without_choices(params, model):
    """The same parameters in a model that has window layers in place of bookmark layers."""
    pattern = model.pattern.replace("b", "w").replace("f", "w")
    return decoder.renamed(params, pattern), dataclasses.replace(model, pattern=pattern)


def reading_model(model, tokens, arguments):
    """The model by `decode.long_index`, with as many choices and chapters looked into as asked for, and lists with room for all."""
    index = decode.long_index(model.index, tokens, arguments.route)
    index = dataclasses.replace(
        index, A=arguments.choices or index.A, beam=arguments.beam or index.beam
    )
    return dataclasses.replace(model, index=index).with_room()


def documents(run, tokens, depth, samples):
    """Prompts that end where the answer begins, answers, and where the needle mentions the key: rows of tokens, places."""
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
        key = text[answer]
        needle = passkey.NEEDLE.format(key=key.decode()).encode()
        begin = text.index(needle)
        yield (
            np.frombuffer(text[: answer.start], np.uint8).astype(np.int32),
            np.frombuffer(key, np.uint8).astype(np.int32),
            (begin + needle.index(key), begin + needle.rindex(key)),
        )


def measure(params, model, empty, batch, ways):
    """Reads a batch once and asks in each way: what of the answers is right, see `how_read`, and ms a token; tokens read a second.

    Args:
        ways: of `ask_by`.
    """
    prompts, answers, places = (np.stack(rows) for rows in zip(*batch))
    # Not made anew: a step that was compiled for blocks on the host belongs to them.
    cache = jax.tree.map(jnp.copy, empty)
    text_BT = prompts[:, : -passkey.QUESTION.index("{")]
    begin = time.perf_counter()
    _, cache = step.prefill(params, text_BT, cache, model)
    jax.block_until_ready(cache)
    rate = text_BT.size / (time.perf_counter() - begin)
    num = answers.shape[1]
    sampling = decode_settings.SamplingSettings(max_tokens=num, tokens_a_call=num)
    asked = {}
    for way in ways:
        own, asks = jax.tree.map(jnp.copy, cache), ask_by(model, way)
        rest_BT = prompts[:, text_BT.shape[1] : -1]
        piece = None if asks == model else step.QUESTION_TOKENS
        own = step.prefill(params, rest_BT, own, asks, piece_tokens=piece)[1]
        jax.block_until_ready(own)
        begin = time.perf_counter()
        stream = generate.stream(params, prompts[:, -1], own, asks, sampling)
        drawn = list(stream)
        ms = 1000 * (time.perf_counter() - begin) / num
        right_BT = np.stack([token.token_B for token in drawn], axis=1) == answers
        read = how_read(drawn[0].readings, places // model.index.C)
        asked[way] = right_BT, read, ms
    return asked, rate


def ask_by(model, way):
    """`ModelSettings.answer_by` the way "ROUTE[:X[:TEMPERATURE_TOKENS[:GAIN]]]"; that of reading if it says the same."""
    route, *numbers = way.split(":")
    route = "" if route == model.index.route else route
    return model.answer_by(route, *map(int, numbers[:2]), *map(float, numbers[2:]))


def how_read(readings, block_id_BX):
    """Of the bookmark layers' readings of a token, the mean number of blocks, and which rows read one of theirs."""
    layers = [x.block_id_BGJ for x in readings if x is not None]
    if not layers:
        return None
    read = np.stack(layers, axis=1)
    finds = (read[..., None] == block_id_BX[:, None, None, None]).any((1, 2, 3, 4))
    return float((read >= 0).sum(-1).mean()), finds


def cell(run, params, model, empty, place, arguments):
    """For each way of asking, the share of samples that were right, and of those that could be; time and bytes.

    Args:
        place: tokens, and the depth.
    """
    samples = list(documents(run, *place, arguments.samples))
    ways = [arguments.route]
    if arguments.answers and "b" in model.pattern:
        ways = arguments.answers.split(",")
    found, rates = {way: [] for way in ways}, []
    for begin in range(0, len(samples), arguments.batch):
        batch = samples[begin : begin + arguments.batch]
        asked, rate = measure(params, model, empty, batch, ways)
        for way in ways:
            found[way].append(asked[way])
        rates.append(rate)
    for way in ways:
        right, reads, ms = zip(*found[way])
        asks = ask_by(model, way)
        has_choices = None not in reads
        yield {
            "answer_route": asks.index.route,
            "answer_X": asks.index.X,
            "answer_temperature_tokens": asks.temperature_tokens,
            "answer_temperature_gain": asks.temperature_gain
            if asks.temperature_tokens
            else 0,
            "accuracy": float(np.concatenate(right).all(1).mean()),
            "digits": float(np.concatenate(right).mean()),
            "key_read": float(np.mean([x[1] for x in reads])) if has_choices else None,
            "blocks_read": float(np.mean([x[0] for x in reads]))
            if has_choices
            else None,
            "samples": len(samples),
            "ms_per_token": statistics.median_low(ms),
            "read_tokens_per_s": max(rates),
            "cache_bytes": caches.num_bytes(empty),
        }


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", default="1048576,10485760")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--samples", type=int, default=50, help="whole batches")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--kinds", default="bookmark,window")
    parser.add_argument("--stores", default="model")
    parser.add_argument("--route", default="chapters")
    parser.add_argument(
        "--answers",
        default="",
        help="how question and answer choose: --route (alone by default) or flat, with :X by a shortlist, :X:N:GAIN sharper after N tokens",
    )
    parser.add_argument("--piece", type=int, default=1024)
    parser.add_argument(
        "--granularity", default="token", help="of reading: token or block"
    )
    parser.add_argument(
        "--choices", type=int, default=0, help="A; 0: as many as in training"
    )
    parser.add_argument("--beam", type=int, default=0, help="0: the model's own")
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.samples % arguments.batch:
        sys.exit(
            f"passkey_long: --samples={arguments.samples} are no whole batches of {arguments.batch}"
        )
    run, params, steps = load(arguments.workdir.absolute())
    trained = {
        "trained_tokens": run.data.T,
        "trained_steps": steps,
        "trained_A": run.model.index.A,
        "window_sinks": run.model.window_sinks,
    }
    way = (
        *("device", "tokens", "depth", "kind", "store", "route"),
        *("A", "beam", "granularity"),
        *("answer_route", "answer_X"),
        *("answer_temperature_tokens", "answer_temperature_gain"),
    )
    origin = provenance.provenance()
    for tokens in map(int, arguments.tokens.split(",")):
        model = reading_model(run.model, tokens, arguments)
        model = model.read_by(arguments.granularity)
        models = {"bookmark": (params, model), "window": without_choices(params, model)}
        for kind in arguments.kinds.split(","):
            for store in arguments.stores.split(","):
                room = decode_settings.CacheSettings(
                    tokens + 16, arguments.piece, store
                )
                empty = caches.empty(models[kind][1], room, arguments.batch)
                for depth in map(float, arguments.depths.split(",")):
                    how = {
                        "device": jax.devices()[0].device_kind,
                        "tokens": tokens,
                        "depth": depth,
                        "kind": kind,
                        "store": store,
                        "route": arguments.route,
                        "A": model.index.A,
                        "J": model.index.J,
                        "beam": model.index.beam,
                        "granularity": model.index.granularity,
                    }
                    place = tokens, depth
                    for found in cell(run, *models[kind], empty, place, arguments):
                        row = trained | how | found
                        print(row, flush=True)
                        record.merge("passkey_long", origin, row, (*trained, *way))


if __name__ == "__main__":
    main()
