"""A cache and a last token to an answer, token by token. Called by `command` and experiments."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from bsa.decode import attend, sample, settings, step
from bsa.decode import cache as caches
from bsa.model import settings as model_settings


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token of each row's answer.

    Attributes:
        token_B: int32, on the host; 0 in rows that had ended.
        is_live_B: bool, rows that were still answering.
        readings: what was read to draw it, for each layer; None but in bookmark layers.
        cache: after it was drawn; the token itself is not in it yet. Gone once the next token is asked for.
    """

    token_B: np.ndarray
    is_live_B: np.ndarray
    readings: list[attend.Reading | None]
    cache: caches.Cache


def stream(
    params,
    token_B,
    cache: caches.Cache,
    model: model_settings.ModelSettings,
    sampling: settings.SamplingSettings,
    *,
    weigh: bool = False,
) -> Iterator[Drawn]:
    """Yields the answer's tokens as they are drawn, until every row has ended.

    Args:
        token_B: int32, the last token of each row's prompt; the cache holds those before it.
        weigh: whether readings say how attention fell.
    Raises:
        ValueError: a row would outgrow the cache; before anything is drawn.
    """
    step.check_room(cache, int(np.asarray(cache.length_B).max()) + sampling.max_tokens)
    token_B = np.asarray(token_B, np.int32)
    is_live_B = np.ones(token_B.shape, bool)
    answers = [bytearray() for _ in token_B]
    for number in range(sampling.max_tokens):
        logits_BV, readings, cache = step.decode_step(
            params,
            jnp.asarray(token_B),
            cache,
            model,
            is_live_B=is_live_B,
            weigh=weigh,
        )
        drawn_B = np.asarray(sample.sample(logits_BV, number, sampling))
        token_B = np.where(is_live_B, drawn_B, 0)
        yield Drawn(token_B, is_live_B, readings, cache)
        if sampling.stop:
            for answer, token in zip(answers, token_B):
                answer.append(token)
            ended_B = [answer.endswith(sampling.stop) for answer in answers]
            is_live_B = is_live_B & ~np.array(ended_B)
        if not is_live_B.any():
            return
