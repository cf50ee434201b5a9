"""A cache and a last token to an answer, some tokens a compiled call. Called by `command` and experiments."""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bsa.decode import attend, sample, settings, step
from bsa.decode import cache as caches
from bsa.model import settings as model_settings


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token of each row's answer.

    Attributes:
        token_B: int32, on the host; 0 in rows that had ended.
        is_live_B: bool, rows that were still answering.
        readings: what was read to draw it, for each layer, on the host; None but in bookmark layers.
        cache: with all tokens that were drawn in the same call, but for the last one of each row. Gone once a token of
            the next call is asked for.
    """

    token_B: np.ndarray
    is_live_B: np.ndarray
    readings: list[attend.Reading | None]
    cache: caches.Cache


class _Answers(NamedTuple):
    """Where the rows are between two tokens.

    Attributes:
        token_B: int32, the last tokens.
        is_live_B: bool, rows that answer on.
        tail_BS: int32, the last S tokens of each answer, as many as the longest stop sequence has; -1 before the first.
    """

    token_B: jax.Array
    is_live_B: jax.Array
    tail_BS: jax.Array


def stream(
    params,
    token_B,
    cache: caches.Cache,
    model: model_settings.ModelSettings,
    sampling: settings.SamplingSettings,
    *,
    weigh: bool = False,
) -> Iterator[Drawn]:
    """Yields the answer's tokens, as many at once as a call draws, until every row has ended.

    Args:
        token_B: int32, the last token of each row's prompt; the cache holds those before it.
        weigh: whether readings say how attention fell.
    Raises:
        ValueError: a row would outgrow the cache; before anything is drawn.
    """
    step.check_room(cache, int(np.asarray(cache.length_B).max()) + sampling.max_tokens)
    token_B = jnp.asarray(token_B, jnp.int32)
    tail_S = jnp.full(max(map(len, sampling.stop), default=0), -1, jnp.int32)
    answers = _Answers(
        token_B,
        jnp.ones(token_B.shape, bool),
        jnp.broadcast_to(tail_S, (*token_B.shape, tail_S.size)),
    )
    limit = jnp.int32(sampling.max_tokens)
    key = jax.random.key(sampling.seed)
    # Other seeds and longer answers share what is compiled.
    sampling = dataclasses.replace(sampling, seed=0, max_tokens=1)
    number = jnp.int32(0)
    draw = _draw if sampling.tokens_a_call else _draw_by_layers
    while answers.is_live_B.any():
        drawn, answers, cache = draw(
            params, answers, cache, (number, limit), key, model, sampling, weigh
        )
        drawn = jax.device_get(drawn)
        num = len(drawn[0])
        for place in range(num):
            token_B, is_live_B, readings = jax.tree.map(
                operator.itemgetter(place), drawn
            )
            if is_live_B.any():
                yield Drawn(token_B, is_live_B, readings, cache)
        number += num


@functools.partial(
    jax.jit, static_argnames=("model", "sampling", "weigh"), donate_argnames="cache"
)
def _draw(params, answers, cache, numbers, key, model, sampling, weigh):
    """The next tokens, which rows were live, and readings, an entry for each token; answers and cache after them.

    Args:
        numbers: of the first of these tokens in its answer, and of tokens in the longest answer.
        key: of all draws.
    """
    first, limit = numbers

    def draw(carry, number):
        answers, cache = carry
        logits_BV, readings, cache = _advance(params, answers, cache, model, weigh)
        drawn = _take(logits_BV, answers, (number, limit), key, sampling)
        return (drawn, cache), (drawn.token_B, answers.is_live_B, readings)

    number_N = first + jnp.arange(sampling.tokens_a_call, dtype=jnp.int32)
    (answers, cache), drawn = lax.scan(draw, (answers, cache), number_N)
    return drawn, answers, cache


def _draw_by_layers(params, answers, cache, numbers, key, model, sampling, weigh):
    """`_draw` of one token, not compiled as a whole."""
    logits_BV, readings, cache = _advance(params, answers, cache, model, weigh)
    after = _take(logits_BV, answers, numbers, key, sampling)
    drawn = after.token_B, answers.is_live_B, readings
    return jax.tree.map(lambda x: x[None], jax.device_get(drawn)), after, cache


def _advance(params, answers, cache, model, weigh):
    """`step.advance` by the last token of each row that answers on."""
    count_B = answers.is_live_B.astype(jnp.int32)
    return step.advance(
        params, answers.token_B[:, None], count_B, cache, model, weigh=weigh
    )


@functools.partial(jax.jit, static_argnames="sampling")
def _take(logits_BV, answers, numbers, key, sampling):
    """Where the rows are with one more token each; arguments as for `_draw`."""
    (token_B, is_live_B, tail_BS), (number, limit) = answers, numbers
    drawn_B = sample.sample(logits_BV, jax.random.fold_in(key, number), sampling)
    token_B = jnp.where(is_live_B, drawn_B, 0)
    tail_BS = jnp.concatenate([tail_BS, token_B[:, None]], axis=1)[:, 1:]
    goes_on_B = is_live_B & (number + 1 < limit)
    for stop in sampling.stop:
        stop_S = jnp.asarray(stop, jnp.int32)
        goes_on_B &= (tail_BS[:, -len(stop) :] != stop_S).any(1)
    return _Answers(token_B, goes_on_B, tail_BS)
