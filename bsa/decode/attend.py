"""Attention of new tokens to a cached text, by kind of layer: `attention.attend` with a memory. Called by `step`.

What a token reads is what it reads in the parallel pass: the same search, the same account of open pages and of room in
the lists of query blocks, wherever a piece of the text begins.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bsa.decode import blocks, dense, kernel, pages, read, settings
from bsa.decode import cache as caches
from bsa.index import grow_rows, learn, local, pooled, route, unite
from bsa.model import attention
from bsa.model import settings as model_settings
from pallas_kernels import selection, shapes

SOUGHT = "sought"
"""What a layer hands on: keys that an index would be made of, and what finds spans among them."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer's attention needs beside its arguments.

    Attributes:
        memory: of what came before.
        count_B: int32, how many of the new tokens are real; what the others get means nothing.
        cache: the cache's settings.
        weigh: whether a reading says how attention fell; of one token at a time only.
    """

    memory: caches.LayerCache
    count_B: jax.Array
    cache: settings.CacheSettings
    weigh: bool


class Reading(NamedTuple):
    """What one token read in a bookmark layer.

    Attributes:
        block_id_BGJ: int32, the blocks that it read; -1 at other places of the list.
        choice_BGA: int32, those that it chose itself, best first, -1 after the last.
        mass_BGJ: float32, share of the attention that fell on each, the mean over heads; None unless asked for.
    """

    block_id_BGJ: jax.Array
    choice_BGA: jax.Array
    mass_BGJ: jax.Array | None


def attend(
    heads: attention.Heads,
    segment_id_BT,
    position_BT,
    model: model_settings.ModelSettings,
    letter: int,
    followed: attention.Followed | None = None,
    *,
    context: Context,
):
    """Puts new tokens into a layer's memory and lets them read it.

    Args:
        heads: of the new tokens, S = T.
        segment_id_BT: None; a row is one document.
        position_BT: int32, places of the new tokens, which follow each other.
        letter: index into the pattern.
        followed: of the bookmark layer before one of kind f, with the lists of the new tokens.
    Returns:
        out_BTHK, and a dict: the new `memory`, the `reading` of a single token in a bookmark layer, else None, a
        bookmark layer's lists in an `attention.Followed`, and what bookmarks are made of under `SOUGHT`.
    """
    q_BTHK, k_BSGK, v_BSGK, sought = heads[:4]
    shapes.check(q_BTHK=q_BTHK, k_BSGK=k_BSGK, position_BT=position_BT)
    T, kind = q_BTHK.shape[1], model.pattern[letter]
    is_real_BT = jnp.arange(T) < context.count_B[:, None]
    view = functools.partial(_view, model, letter)
    memory = context.memory
    if memory.pages is not None:
        memory = _admit(memory, position_BT, context.count_B, view(position_BT))
    if memory.host is None:
        memory = _write(memory, k_BSGK, v_BSGK, position_BT, is_real_BT)
    if kind == "d":
        out_BTHK = dense.read(q_BTHK, memory, position_BT, model.K**-0.5)
        return out_BTHK, {"memory": memory, "reading": None}

    choice_BGTA, recent_BGTA = None, memory.recent_BGTA
    if heads.filter_CGK is not None:
        memory, sought = _mix(
            sought, heads.filter_CGK, memory, context.count_B, position_BT
        )
    if kind == "b":
        memory, choice_BGTA = _choose(
            *(*sought, heads.boundary, memory),
            *(context.count_B, position_BT, view, model),
        )
    capacity = context.cache.capacity_tokens + context.cache.piece_tokens
    if kind == "f":
        lists = followed.lists
    else:
        lists = _lists(choice_BGTA, recent_BGTA, position_BT, view, model, capacity)
    handed = {"memory": memory, "reading": None, SOUGHT: (sought[1], heads.boundary)}
    if kind == "b":
        handed[attention.FOLLOWED] = attention.Followed(lists, None, None)
    weigh = context.weigh and kind == "b"
    if not (weigh or model.is_biased) and kernel.can_read(
        q_BTHK, memory, kind, model.implementation
    ):
        out_BTHK = kernel.attend(
            *(q_BTHK, memory.k, memory.v, lists, position_BT, model.K**-0.5)
        )
        if kind == "b" and T == 1:
            handed["reading"] = _reading(lists, choice_BGTA, None)
        return out_BTHK, handed
    new = (k_BSGK, v_BSGK, position_BT, is_real_BT)
    handed["memory"], taken = _take(memory, new, lists.block_id_BGQJ)
    bias_BGQTJ = None
    if kind == "b" and model.is_biased:
        queries = sought[0], q_BTHK
        bias_BGQTJ = read.block_bias(
            queries, taken[0], memory.index, lists, position_BT, view, model
        )
    out_BTHK, mass_BGJ = read.read_lists(
        *(q_BTHK, *taken, lists, position_BT, bias_BGQTJ),
        is_near=_is_near(model, letter),
        weigh=weigh,
    )
    if kind == "b" and T == 1:
        handed["reading"] = _reading(lists, choice_BGTA, mass_BGJ)
    return out_BTHK, handed


def _reading(lists, choice_BGTA, mass_BGJ):
    """The `Reading` of a single token."""
    reads_BGJ = lists.token_mask_BGQJ[:, :, 0] > 0
    block_id_BGJ = jnp.where(reads_BGJ, lists.block_id_BGQJ[:, :, 0], -1)
    return Reading(block_id_BGJ, choice_BGTA[:, :, 0], mass_BGJ)


def _slots(memory, block_id):
    """Where blocks [B, G, ...] lie; -1 for those that are not kept."""
    if memory.pages is None:
        return memory.k.slot(block_id)
    return pages.slots(memory.pages, block_id)


def _take(memory, new, block_id_BGQJ):
    """The memory, and keys and values of listed blocks, gathered; from the host as it gets the `new` ones."""
    if memory.host is not None:
        *taken, near = memory.host.exchange(new, block_id_BGQJ, memory.near)
        return dataclasses.replace(memory, near=near), taken
    slot, take = _slots(memory, block_id_BGQJ), jax.vmap(jax.vmap(blocks.take))
    return memory, (take(memory.k, slot), take(memory.v, slot))


def _admit(memory, place_BT, count_B, view):
    """The memory with slots for the blocks that new tokens begin."""
    low_B, C = view.low_BT[:, 0], view.key_block
    kept = pages.admit(memory.pages, place_BT, count_B, low_B, view.sink_blocks, C)
    return dataclasses.replace(memory, pages=kept)


def _write(memory, k_BSGK, v_BSGK, place_BT, is_real_BT):
    """The memory with new keys and values."""
    (B, T), G, C = place_BT.shape, k_BSGK.shape[2], memory.k.value_BGNCK.shape[3]
    block_id_BGT = jnp.broadcast_to(place_BT[:, None] // C, (B, G, T))
    slot_BGT = jnp.where(is_real_BT[:, None], _slots(memory, block_id_BGT), -1)
    return dataclasses.replace(
        memory,
        k=blocks.write(memory.k, k_BSGK, slot_BGT, place_BT),
        v=blocks.write(memory.v, v_BSGK, slot_BGT, place_BT),
    )


def _mix(sought, filter_CGK, memory, count_B, place_BT):
    """The memory with the last of the index's keys, and queries and keys as the filter mixes these."""
    (query_BTGK, key_BSGK), earlier_BSGK = sought, memory.earlier_BSGK
    C = memory.index.open_BCGK.shape[1]
    mixed_BSGK = learn.mix(key_BSGK, earlier_BSGK, place_BT, filter_CGK, C)
    keys = jnp.concatenate([earlier_BSGK, key_BSGK], axis=1)
    last_BSGK = read.slices(keys, count_B, earlier_BSGK.shape[1], axis=1)
    memory = dataclasses.replace(memory, earlier_BSGK=last_BSGK)
    return memory, (query_BTGK, mixed_BSGK)


def _choose(q_BTHK, k_BSGK, boundary, memory, count_B, place_BT, view, model):
    """The memory, and what the new tokens choose of the blocks that are kept; with bookmarks of new keys if they are many.

    Those of a few keys `step` makes, in all layers at once: see `grow_rows.may_wait`.
    """
    index = memory.index
    if not grow_rows.may_wait(k_BSGK.shape[1], model.index):
        [index] = grow_rows.append_rows(
            [index], [k_BSGK], count_B, model.index, [boundary]
        )
    is_real_BT = jnp.arange(place_BT.shape[1]) < count_B[:, None]
    choice_BGTA, _ = pooled.search_blocks(
        q_BTHK,
        memory.k,
        index.bookmarks,
        route.open_blocks(view(place_BT), model.index),
        place_BT,
        is_real_BT,
        model.index,
        scale=model.K**-0.5,
        read=blocks.read,
        implementation=model.implementation,
    )
    kept = memory.pages
    if kept is not None:
        choice_BGTA = jnp.where(pages.slots(kept, choice_BGTA) < 0, -1, choice_BGTA)
        kept = pages.touch(kept, choice_BGTA, place_BT, is_real_BT)
    known_BGTA = jnp.concatenate([memory.recent_BGTA, choice_BGTA], axis=2)
    recent_BGTA = read.slices(known_BGTA, count_B, memory.recent_BGTA.shape[2], axis=2)
    memory = dataclasses.replace(
        memory, index=index, recent_BGTA=recent_BGTA, pages=kept
    )
    return memory, choice_BGTA


def _view(model, letter, place_BT):
    """What tokens at these places read anyway."""
    if model.pattern[letter] == "c":
        return local.chunk(place_BT, model.chunk_tokens, model.index.C, place_BT)
    window_blocks, sink_blocks = caches.local_blocks(model, letter)
    C = model.index.C
    return local.window(
        place_BT,
        window_tokens=window_blocks * C,
        sink_tokens=sink_blocks * C,
        key_block=C,
        place_BT=place_BT,
    )


def _is_near(model, letter):
    """The kernel's `mask_mod` of layers that cut inside a block, or None."""
    if model.pattern[letter] == "c":
        chunk = model.chunk_tokens
        return lambda b, h, q_id, k_id: k_id // chunk == q_id // chunk
    if model.pattern[letter] == "s":
        return lambda b, h, q_id, k_id: q_id - k_id < model.window_tokens[letter]
    return None


def _lists(choice_BGTA, recent_BGTA, position_BT, view, model, capacity_tokens):
    """The lists of the query blocks that hold the new tokens; of a single token, its own part of one.

    Lists are made from the beginning of the first token's query block on, with the choices before it that may still be
    open. Later choices in the last query block are not known yet, and change nothing for the tokens before them.
    """
    block, T = model.index.query_block, position_BT.shape[1]
    num = (T + 2 * block - 2) // block
    lead = 0 if choice_BGTA is None else caches.lead_blocks(model)
    offset_B = position_BT[:, 0] % block
    if choice_BGTA is not None:
        known = jnp.concatenate([recent_BGTA, choice_BGTA], axis=2)
        padding = ((0, 0), (0, 0), (0, num * block - T), (0, 0))
        known = jnp.pad(known, padding, constant_values=-1)
        choice_BGTA = read.slices(
            known, block - 1 - offset_B, (lead + num) * block, axis=2
        )
    begin_B = position_BT[:, 0] - offset_B - lead * block
    place_BT = begin_B[:, None] + jnp.arange((lead + num) * block, dtype=jnp.int32)
    lists, _ = unite.unite(
        choice_BGTA,
        view(place_BT),
        model.index,
        model.G,
        num_blocks=(capacity_tokens + 2 * block) // model.index.C + 2,
    )
    block_id = lists.block_id_BGQJ[:, :, lead:]
    mask = lists.token_mask_BGQJ[:, :, lead:]
    if T == 1:
        mask = mask >> offset_B.astype(jnp.uint32)[:, None, None, None] & 1
        block = 1
    count = lists.count_BGQ[:, :, lead:]
    return selection.BlockSelection(block_id, count, mask, block, model.index.C)
