"""Some tokens of each row through the model and into the cache: a compiled call a layer, or all in one. Called by `generate`.

    cache = cache.empty(model, settings, batch)
    logits, cache = prefill(params, tokens, cache, model)
    logits, _, cache = decode_step(params, logits.argmax(-1), cache, model)

A cache that went into a step is gone: its memory is that of the one that came out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.decode import again, attend, settings
from bsa.decode import cache as caches
from bsa.index import grow_rows
from bsa.model import decoder
from bsa.model import settings as model_settings
from pallas_kernels import shapes

QUESTION_TOKENS = 64
"""Of a piece of a question that is read otherwise than its text: nothing of it is compiled yet, and it is short."""


def prefill(
    params,
    token_BT,
    cache: caches.Cache,
    model: model_settings.ModelSettings,
    *,
    count_B=None,
    piece_tokens: int | None = None,
    after_piece=None,
):
    """Reads tokens, as many as there are; the same cache whatever the pieces they come in.

    Pieces of a length share what is compiled, the last one padded; a single token is read by the step of `decode_step`.

    Args:
        token_BT: int32, on the host.
        count_B: how many of its tokens each row has, on the host; None: T.
        piece_tokens: tokens of a piece, at most the cache's, which None stands for.
        after_piece: called with the logits and the cache after each piece; True ends reading there.
    Returns:
        logits_BV: float32, of the token after each row's last; 0 for a row that had none. And the cache.
    Raises:
        ValueError: no tokens, or more than there is room for; the cache is as it was.
    """
    shapes.check(token_BT=token_BT)
    B, T = token_BT.shape
    count_B = np.full(B, T) if count_B is None else np.asarray(count_B)
    if not T or not count_B.any():
        raise ValueError("the prompt is empty; give at least one token")
    check_room(cache, int((np.asarray(cache.length_B) + count_B).max()))
    logits_BV = jnp.zeros((B, model.V), jnp.float32)
    longest = cache.room.piece_tokens
    piece = 1 if T == 1 else min(piece_tokens or longest, longest)
    # A program of all layers takes long to compile, which pays for the few tokens that answer.
    read = _advance if grow_rows.may_wait(piece, model.index) else advance
    for begin in range(0, T, piece):
        part = np.zeros((B, piece), np.int32)
        tokens = token_BT[:, begin : begin + piece]
        part[:, : tokens.shape[1]] = tokens
        counts = np.clip(count_B - begin, 0, piece).astype(np.int32)
        new_BV, _, cache = read(params, part, counts, cache, model)
        logits_BV = jnp.where(counts[:, None] > 0, new_BV, logits_BV)
        if after_piece is not None and after_piece(logits_BV, cache):
            break
    return logits_BV, cache


def decode_step(
    params,
    token_B,
    cache: caches.Cache,
    model: model_settings.ModelSettings,
    *,
    is_live_B=None,
    weigh: bool = False,
):
    """Reads one token of each row; there must be room for it, see `check_room`.

    Args:
        token_B: int32.
        is_live_B: bool, rows that read a token; None: all.
        weigh: whether readings say how attention fell.
    Returns:
        logits_BV of the next token, an `attend.Reading` for each bookmark layer, None for others, and the cache.
    """
    shapes.check(token_B=token_B)
    counts = np.ones(token_B.shape, np.int32) if is_live_B is None else is_live_B
    counts = jnp.asarray(counts, jnp.int32)
    return _advance(params, token_B[:, None], counts, cache, model, weigh=weigh)


def check_room(cache: caches.Cache, num_tokens: int) -> None:
    """Raises ValueError if a row of so many tokens finds no room."""
    if num_tokens > cache.room.capacity_tokens:
        raise ValueError(
            f"{num_tokens} tokens do not fit into a cache of {cache.room.capacity_tokens}; "
            f"make one with capacity_tokens={num_tokens} or more"
        )


def advance(
    params,
    token_BT,
    count_B,
    cache: caches.Cache,
    model: model_settings.ModelSettings,
    weigh: bool = False,
):
    """A step: logits after each row's last real token, readings, and the cache with the tokens.

    A compiled call for each layer, which layers that differ by their parameters alone share; in a compiled function they
    become one program.

    Args:
        count_B: int32, how many of the tokens each row has; there must be room for them.
    """
    count_B = jnp.asarray(count_B)
    x_BTD, position_BT = _begin(params, token_BT, cache.length_B, model)

    def apply(layer, letter, own, x_BTD, followed):
        way = _Way(model, model.first_alike(letter), cache.room, weigh)
        memory = cache.layers[layer]
        return _apply_layer(own, x_BTD, position_BT, count_B, followed, memory, way)

    x_BTD, handed = decoder.through_layers(params, x_BTD, model, apply)
    hidden_BD, logits_BV, length_B = _end(params, x_BTD, count_B, cache.length_B, model)
    layers = _grow(handed, hidden_BD, count_B, model)
    cache = caches.Cache(tuple(layers), length_B, cache.room)
    return logits_BV, [layer["reading"] for layer in handed], cache


@functools.partial(jax.jit, static_argnames="model")
def _begin(params, token_BT, length_B, model):
    """What goes into the first layer, and the tokens' places."""
    position_BT = length_B[:, None] + jnp.arange(token_BT.shape[1], dtype=jnp.int32)
    return decoder.embed(params, token_BT, model), position_BT


@dataclasses.dataclass(frozen=True)
class _Way:
    """What a layer is compiled for."""

    model: model_settings.ModelSettings
    letter: int
    room: settings.CacheSettings
    weigh: bool


@functools.partial(jax.jit, static_argnames="way", donate_argnames=("x_BTD", "memory"))
def _apply_layer(own, x_BTD, position_BT, count_B, followed, memory, way):
    """`decoder.apply_layer` with the memory of one layer."""
    attends = functools.partial(
        again.attend, context=attend.Context(memory, count_B, way.room, way.weigh)
    )
    return decoder.apply_layer(
        own, x_BTD, position_BT, way.model, way.letter, attends, followed
    )


@functools.partial(jax.jit, static_argnames="model")
def _end(params, x_BTD, count_B, length_B, model):
    """After the last layer, at each row's last real token: hidden states and logits; and the rows' new lengths."""
    last_B = jnp.maximum(count_B - 1, 0)
    hidden_BTD = decoder.finish(params, x_BTD, model)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    logits_BV = jnp.einsum(
        "bd,vd->bv",
        hidden_BD,
        decoder.head(params).astype(hidden_BD.dtype),
        preferred_element_type=jnp.float32,
    )
    return hidden_BD, logits_BV, length_B + count_B


def _grow(handed, hidden_BD, count_B, model):
    """The memories that layers handed on, with bookmarks of few new keys: many have theirs already."""
    memories = [layer["memory"] for layer in handed]
    places = [i for i, memory in enumerate(memories) if memory.index is not None]
    if not places:
        return memories
    keys, boundaries = zip(*(handed[i][attend.SOUGHT] for i in places))
    if not grow_rows.may_wait(keys[0].shape[1], model.index):
        return memories
    indexes = [memories[i].index for i in places]
    grown = _append(indexes, keys, count_B, boundaries, hidden_BD, index=model.index)
    for i, index in zip(places, grown):
        memories[i] = dataclasses.replace(memories[i], index=index)
    return memories


@functools.partial(jax.jit, static_argnames="index", donate_argnames="indexes")
def _append(indexes, keys, count_B, boundaries, after, *, index):
    """`grow_rows.append_rows`, compiled."""
    return grow_rows.append_rows(indexes, keys, count_B, index, boundaries, after=after)


_advance = jax.jit(advance, static_argnames=("model", "weigh"), donate_argnames="cache")
