"""How fast SmolLM2-135M reads and answers, dense and with bookmarks, at texts of its own 8,192 tokens and longer.

Command: python -m experiments.pretrained_speed [--tokens=8192,32768,131072] [--kinds=bookmark,pooled,dense] [--route=flat]
    [--forwards=3] [--piece=2048]
Hardware: one H100 or H200
Output: experiments/results/pretrained_speed.json; cells measured before on the same device stay

In bfloat16, with the index of configs/smollm2.py, whose digests are in bfloat16 too and searched by `--route` (chapters as
`experiments.decode` makes them), and positions stretched by NTK, on tokens at random. Kind `pooled` chooses without the
exact step, by the mean query of a group's heads (`POOLED`), which is what Hopper's search kernel does. `forward_tokens_per_s`: the parallel pass
up to the last hidden states; `prefill_tokens_per_s`: reading into the cache, a piece at a time; `ms_per_token`: of `--steps`
greedy tokens after the text, the median over calls that draw `--tokens_a_call` each; 0: layer by layer. As one program all
layers compile for a minute or more a cell: with JAX_COMPILATION_CACHE_DIR the cells, each a process beside the others, compile
at once, and one process in the same folder measures them after that (kernels hold the paths of their source files), all
with the same --steps, which caches have room for.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from bsa.decode import cache as caches
from bsa.decode import generate, step
from bsa.decode import settings as decode_settings
from bsa.model import decoder
from bsa.model import settings as model_settings
from bsa.pretrained import parameters
from bsa.train import provenance, settings, transfer
from configs import smollm2
from experiments import decode, record

POOLED = {"R": 4, "A": 16, "X": 0, "query_pool": "mean"}
"""The index of `experiments.selector_loss`'s open16-points4-pooled: 0.06, 0.01 and 0.02 nats over dense."""

CELL = ("device", "tokens", "kind", "route", "piece_tokens", "tokens_a_call")


def open_model(kind: str, route: str, num_tokens: int):
    """The model's settings and its parameters in bfloat16."""
    config = smollm2.get_config("bookmark" if kind == "pooled" else kind)
    config.model.update(dtype="bfloat16")
    config.index.update(store="bfloat16")
    if kind == "pooled":
        config.index.update(POOLED)
    config.data.update(T=num_tokens)
    run, opened = transfer.open_model(settings.from_config(config))
    longest = opened.architecture.max_tokens
    scaling = dataclasses.replace(
        run.model.rope_scaling,
        kind="ntk" if num_tokens > longest else "none",
        trained_tokens=longest,
        factor=max(1.0, num_tokens / longest),
    )
    index = run.model.index
    if route != "flat":
        index = decode.long_index(index, num_tokens, route)
    model = dataclasses.replace(run.model, rope_scaling=scaling, index=index)
    params = parameters.arrange(parameters.load(opened), model.pattern)
    return model, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)


def seconds(function) -> float:
    """Time of a call that is waited for."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def forward_seconds(
    params, token_BT, model: model_settings.ModelSettings, times: int
) -> float:
    """Median time of the parallel pass, of so many."""
    position_BT = jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None]

    @jax.jit
    def forward(params, token_BT):
        segment_id_BT = jnp.ones_like(token_BT)
        return decoder.apply(params, token_BT, segment_id_BT, position_BT, model)[0]

    token_BT = jnp.asarray(token_BT)
    jax.block_until_ready(forward(params, token_BT))
    return statistics.median(
        seconds(lambda: forward(params, token_BT)) for _ in range(times)
    )


def measure(num_tokens: int, kind: str, flags: argparse.Namespace) -> dict:
    """The record of one cell."""
    piece, steps = flags.piece, flags.steps
    model, params = open_model(kind, flags.route, num_tokens)
    random = np.random.default_rng(num_tokens)
    token_BT = random.integers(0, model.V, (1, num_tokens), np.int32)
    rate = None
    if flags.forwards:
        rate = num_tokens / forward_seconds(params, token_BT, model, flags.forwards)

    room = decode_settings.CacheSettings(num_tokens + piece + steps, piece)
    cache = caches.empty(model, room, 1)
    cache_bytes = caches.num_bytes(cache)
    _, cache = step.prefill(params, token_BT[:, :piece], cache, model)  # compiles
    jax.block_until_ready(cache)
    begin = time.perf_counter()
    logits_BV, cache = step.prefill(params, token_BT[:, piece:], cache, model)
    jax.block_until_ready(cache)
    prefill = time.perf_counter() - begin
    first_B = np.asarray(logits_BV.argmax(-1))
    sampling = decode_settings.SamplingSettings(
        max_tokens=steps, tokens_a_call=flags.tokens_a_call
    )
    stream = generate.stream(params, first_B, cache, model, sampling)
    a_call = max(1, flags.tokens_a_call)
    times = [time.perf_counter() for _ in stream][::a_call]
    return {
        "device": jax.devices()[0].device_kind,
        "tokens": num_tokens,
        "kind": kind,
        "route": flags.route,
        "piece_tokens": piece,
        "tokens_a_call": flags.tokens_a_call,
        "forward_tokens_per_s": rate,
        "prefill_tokens_per_s": (num_tokens - piece) / prefill,
        "ms_per_token": 1e3 * float(np.median(np.diff(times))) / a_call,
        "cache_bytes": cache_bytes,
    }


def main() -> None:
    """Measures cell by cell, and records each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--kinds", default="bookmark,pooled,dense")
    parser.add_argument("--route", default="flat", help="flat, chapters or graph")
    parser.add_argument("--forwards", type=int, default=3, help="0: none")
    parser.add_argument("--piece", type=int, default=2048, help="tokens read at once")
    parser.add_argument("--steps", type=int, default=32, help="tokens answered")
    parser.add_argument("--tokens_a_call", type=int, default=8, help="under --steps")
    flags = parser.parse_args()
    for num_tokens in map(int, flags.tokens.split(",")):
        for kind in flags.kinds.split(","):
            row = measure(num_tokens, kind, flags)
            print(row, flush=True)
            record.merge("pretrained_speed", provenance.provenance(), row, CELL)


if __name__ == "__main__":
    main()
