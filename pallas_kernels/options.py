"""`Options`: how one call turns a logit into a weight, handed by `dispatch` to every implementation."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Options:
    """The rules that a query and a key must meet, and what happens to their logit.

    Attributes:
        scale: multiplies every logit before anything else.
        causal: a query reads a key only if the key's id is at most its own.
        score_mod: None, or (score, b, h, q_id, k_id) -> score of the same shape.
        mask_mod: None, or (b, h, q_id, k_id) -> bool; True where the key may be read.
        query_offset: id of the first query token; int, int32 scalar, or int32[B], one for
            each sequence.
        key_offset: id of the first key token; int or int32 scalar.

    Both mods get float32 or int32 arrays that broadcast against each other, in whatever
    layout the implementation works in: elementwise operations only. b and h count
    whole batches and query heads. A mod sees masked and padded pairs too, and must be
    finite there (0 * inf is NaN in its gradient).
    """

    scale: float
    causal: bool = True
    score_mod: Callable[..., jax.Array] | None = None
    mask_mod: Callable[..., jax.Array] | None = None
    query_offset: int | jax.Array = 0
    key_offset: int | jax.Array = 0
