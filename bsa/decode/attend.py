"""Attention of new tokens to a cached text, by kind of layer: `attention.attend` with a memory. Called by `step`.

What a token reads is what it reads in the parallel pass: the same search, the same account of open pages and of room in
the lists of query blocks, wherever a piece of the text begins.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bsa.decode import blocks, dense, kernel, pages, settings
from bsa.decode import cache as caches
from bsa.index import digest, grow, learn, local, route, unite
from bsa.model import settings as model_settings
from pallas_kernels import selection, shapes, xla_group


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
    q_BTHK,
    k_BSGK,
    v_BSGK,
    segment_id_BT,
    position_BT,
    model: model_settings.ModelSettings,
    letter: int,
    *,
    context: Context,
):
    """Puts new tokens into a layer's memory and lets them read it.

    Args:
        k_BSGK, v_BSGK: keys and values of the new tokens, S = T.
        segment_id_BT: None; a row is one document.
        position_BT: int32, places of the new tokens, which follow each other.
        letter: index into the pattern.
    Returns:
        out_BTHK, and the new memory with the `Reading` of a single token in a bookmark layer, else None.
    """
    shapes.check(q_BTHK=q_BTHK, k_BSGK=k_BSGK, position_BT=position_BT)
    T, kind, scale = q_BTHK.shape[1], model.pattern[letter], q_BTHK.shape[-1] ** -0.5
    is_real_BT = jnp.arange(T) < context.count_B[:, None]
    view = functools.partial(_view, model, letter)
    memory = context.memory
    if memory.pages is not None:
        local_view = view(position_BT)
        admitted = pages.admit(
            memory.pages,
            position_BT,
            context.count_B,
            local_view.low_BT[:, 0],
            local_view.sink_blocks,
            model.index.C,
        )
        memory = dataclasses.replace(memory, pages=admitted)
    if memory.host is None:
        memory = _write(memory, k_BSGK, v_BSGK, position_BT, is_real_BT)
    if kind == "d":
        out_BTHK = dense.read(q_BTHK, memory, position_BT, scale)
        return out_BTHK, (memory, None)

    choice_BGTA, recent_BGTA = None, memory.recent_BGTA
    if kind == "b":
        memory, choice_BGTA = _choose(
            q_BTHK, k_BSGK, memory, context.count_B, position_BT, view, model, scale
        )
    capacity = context.cache.capacity_tokens + context.cache.piece_tokens
    lists = _lists(choice_BGTA, recent_BGTA, position_BT, view, model, capacity)
    weigh = context.weigh and kind == "b"
    if not weigh and kernel.can_read(q_BTHK, memory, model.implementation):
        out_BTHK = kernel.read(
            q_BTHK, memory.k, memory.v, lists, position_BT[:, 0], scale
        )
        return out_BTHK, (memory, _reading(lists, choice_BGTA, None))
    if memory.host is None:
        slot = _slots(memory, lists.block_id_BGQJ)
        take = jax.vmap(jax.vmap(blocks.take))
        read = take(memory.k, slot), take(memory.v, slot)
    else:
        new = (k_BSGK, v_BSGK, position_BT, is_real_BT)
        read = memory.host.exchange(*new, lists.block_id_BGQJ)
    is_near = _is_near(model, letter)
    bias_of = functools.partial(_bias, model, letter)
    out_BTHK, mass_BGJ = _read_lists(
        q_BTHK, *read, lists, position_BT, scale, is_near, bias_of, weigh
    )
    if kind != "b" or T > 1:
        return out_BTHK, (memory, None)
    return out_BTHK, (memory, _reading(lists, choice_BGTA, mass_BGJ))


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


def _choose(q_BTHK, k_BSGK, memory, count_B, place_BT, view, model, scale):
    """The memory with bookmarks of new keys, and what the new tokens choose of the blocks that are kept."""
    index = grow.append_rows(memory.index, k_BSGK, count_B, model.index)
    choice_BGTA, _ = route.search_blocks(
        q_BTHK,
        memory.k,
        index.bookmarks,
        view(place_BT).open_blocks,
        model.index,
        scale=scale,
        read=blocks.read,
    )
    kept = memory.pages
    if kept is not None:
        choice_BGTA = jnp.where(pages.slots(kept, choice_BGTA) < 0, -1, choice_BGTA)
        is_real_BT = jnp.arange(place_BT.shape[1]) < count_B[:, None]
        kept = pages.touch(kept, choice_BGTA, place_BT, is_real_BT)
    known_BGTA = jnp.concatenate([memory.recent_BGTA, choice_BGTA], axis=2)
    recent_BGTA = _slices(known_BGTA, count_B, memory.recent_BGTA.shape[2], axis=2)
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


def _slices(x, first_B, num, axis):
    """`num` entries along an axis, in each row from its own first one on."""
    take = functools.partial(lax.dynamic_slice_in_dim, slice_size=num, axis=axis - 1)
    return jax.vmap(take)(x, first_B)


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
        choice_BGTA = _slices(known, block - 1 - offset_B, (lead + num) * block, axis=2)
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


def _bias(model, letter, q_BGQTHK, k_BGQJCK, block_id_BGQJ, place_BT):
    """`learn.block_bias` of listed blocks, whose digests are those of their keys; None if scores are no bias."""
    if model.pattern[letter] != "b" or not model.score_weight:
        return None
    B, G, Q, J, _, K = k_BGQJCK.shape
    k_BGNCK = k_BGQJCK.reshape(B, G, Q * J, -1, K)
    digests = digest.summarise(k_BGNCK, model.index)[:2]
    digests = [x.reshape(B, G, Q, J, *x.shape[3:]) for x in digests]
    open_blocks = _view(model, letter, place_BT).open_blocks
    open_blocks = [x.reshape(B, Q, -1) for x in open_blocks]
    given = q_BGQTHK, digests, block_id_BGQJ, open_blocks, model.index
    return learn.block_bias(*given, scale=K**-0.5, weight=model.score_weight)


def _read_lists(
    q_BTHK, k_BGQJCK, v_BGQJCK, lists, position_BT, scale, is_near, bias_of, weigh
):
    """Attention of the new tokens to their lists; and, if asked for, how that of a single one fell on its blocks.

    Args:
        is_near: see `_is_near`.
        bias_of: (queries, keys, ids, places) -> bias_BGQTJ or None.
    """
    B, T, H, K = q_BTHK.shape
    G, Q = lists.block_id_BGQJ.shape[1:3]
    block, C = lists.query_block, lists.key_block
    offset_B = position_BT[:, 0] % block
    begin_B = position_BT[:, 0] - offset_B

    # Queries stand where their bits stand in the masks.
    q = jnp.zeros((B, Q * block, H, K), q_BTHK.dtype)
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
    q = jax.vmap(put)(q, q_BTHK, offset_B)
    q_BGQTHK = q.reshape(B, Q, block, G, H // G, K).transpose(0, 3, 1, 2, 4, 5)

    place_BT = begin_B[:, None] + jnp.arange(Q * block, dtype=jnp.int32)
    bias_BGQTJ = bias_of(q_BGQTHK, k_BGQJCK, lists.block_id_BGQJ, place_BT)
    num_keys = jnp.iinfo(jnp.int32).max
    rules = xla_group.Rules(scale, True, None, is_near, num_keys, q_BTHK.dtype)
    out_BGQTHK, lse_BGQTH = xla_group.attend_group(
        rules,
        xla_group.Queries(q_BGQTHK, bias_BGQTJ),
        xla_group.Blocks(k_BGQJCK, v_BGQJCK, ()),
        xla_group.Lists(
            lists.block_id_BGQJ,
            lists.token_mask_BGQJ,
            None,
            place_BT.reshape(B, Q, block),
        ),
        xla_group.Context(None, jnp.int32(0), (), ()),
    )
    out_BTHK = out_BGQTHK.transpose(0, 2, 3, 1, 4, 5).reshape(B, Q * block, H, K)
    out_BTHK = _slices(out_BTHK, offset_B, T, axis=1)
    if not weigh:
        return out_BTHK, None
    s_BGHJC = scale * jnp.einsum(
        "BGHK,BGJCK->BGHJC",
        q_BGQTHK[:, :, 0, 0],
        k_BGQJCK[:, :, 0],
        preferred_element_type=jnp.float32,
    )
    if bias_BGQTJ is not None:
        s_BGHJC += bias_BGQTJ[:, :, 0, 0, None, :, None]
    id_BGJC = lists.block_id_BGQJ[:, :, 0, :, None] * C + jnp.arange(C)
    reads = (lists.token_mask_BGQJ[:, :, 0, :, None] > 0) & (
        id_BGJC <= position_BT[:, :, None, None]
    )
    share = jnp.exp(s_BGHJC - lse_BGQTH[:, :, 0, 0, :, None, None])
    return out_BTHK, jnp.where(reads[:, :, None], share, 0).sum(-1).mean(2)
