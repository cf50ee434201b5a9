"""Choices of single tokens to one list per query block with a token mask: the `BlockSelection` that a kernel reads.

The list is the union of what its tokens read, so tiles stay full; the mask keeps selection exact per token. A chosen
block stays open for the next tokens ("open pages"). Called by `route` for bookmark layers, and by `bsa.model.attention`
for window and chunked ones, which choose nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import local, settings
from pallas_kernels import selection, shapes


@jax.named_scope("unite")
def unite(
    choice_BGTA,
    view: local.LocalView,
    index: settings.IndexSettings,
    num_groups: int,
    *,
    num_blocks: int | None = None,
    before_BGUA=None,
):
    """Builds the lists of all query blocks.

    A list holds local blocks first, then chosen ones in the order of the tokens that first chose them, and has room for
    J, or for as many as there are. From the first token whose new blocks do not fit, no later token of the query block
    opens another. So what a token reads, and even where in the list it stands (which decides how sums are rounded),
    depends on earlier tokens only, and decoding can keep the same account.

    Args:
        choice_BGTA: int32 block ids, distinct for a token, -1 where it chose fewer; None if nobody chooses.
        view: what tokens read anyway.
        num_groups: G.
        num_blocks: more than any block id, where the tokens are part of a row; they begin at a whole query block.
            None: the tokens are a row.
        before_BGUA: choices of the `open_tokens` - 1 tokens before them; None: there are none.
    Returns:
        A `BlockSelection`, and refused_BGQ: int32, how many chosen blocks found no room.
    Raises:
        ValueError: T is no multiple of the query block, J is too small for the local blocks, or ids overflow.
    """
    sizes = shapes.check(choice_BGTA=choice_BGTA, low_BT=view.low_BT)
    B, T, block = sizes["B"], sizes["T"], index.query_block
    if T % block:
        raise ValueError(
            f"T={T} is no multiple of query_block={block}: pad the sequence to whole blocks"
        )
    span = block + index.open_tokens - 1  # tokens whose choices a query block can read
    radix = span + 1
    num_blocks = num_blocks or T // view.key_block + 1
    if num_blocks * radix >= 2**31:
        raise ValueError(
            f"{num_blocks} blocks of {view.key_block} tokens overflow int32 sort keys; use larger blocks"
        )

    local_BGQP = _local_blocks(view, block)[:, None]
    # No list is longer than there are blocks: what would stay empty costs time.
    room = min(index.J, num_blocks) if choice_BGTA is not None else 0
    length = max(room, local_BGQP.shape[-1])
    if choice_BGTA is not None and index.J < local_BGQP.shape[-1]:
        raise ValueError(
            f"J={index.J} blocks cannot hold the {local_BGQP.shape[-1]} that every query block reads"
        )
    local_BGQP = jnp.broadcast_to(local_BGQP, (B, num_groups, *local_BGQP.shape[2:]))
    key_BGQP = jnp.where(local_BGQP < 0, -1, local_BGQP * radix)
    if choice_BGTA is not None:
        id_BGQUA = _visible_choices(choice_BGTA, before_BGUA, block, index.open_tokens)
        time_UA = 1 + jnp.arange(span, dtype=jnp.int32)[:, None]
        chosen = jnp.where(id_BGQUA < 0, -1, id_BGQUA * radix + time_UA)
        key_BGQP = jnp.concatenate(
            [key_BGQP, chosen.reshape(*chosen.shape[:3], -1)], -1
        )

    id_BGQJ, opener_bits, refused_BGQ = _merge(key_BGQP, radix, length)
    opened = _stay_open(opener_bits, index.open_tokens, block)
    mask_BGQJ = _token_mask(id_BGQJ, opened, view, block)
    count_BGQ = (id_BGQJ >= 0).sum(-1, dtype=jnp.int32)
    return (
        selection.BlockSelection(id_BGQJ, count_BGQ, mask_BGQJ, block, view.key_block),
        refused_BGQ,
    )


def without(
    lists: selection.BlockSelection, local_lists: selection.BlockSelection
) -> selection.BlockSelection:
    """The lists less what tokens read anyway: `unite` of the same view without choices, which begins every list."""
    missing = lists.block_id_BGQJ.shape[-1] - local_lists.block_id_BGQJ.shape[-1]
    padding = ((0, 0),) * 3 + ((0, missing),)
    local_BGQJ = jnp.pad(local_lists.token_mask_BGQJ, padding)
    mask_BGQJ = lists.token_mask_BGQJ & ~local_BGQJ
    return dataclasses.replace(lists, token_mask_BGQJ=mask_BGQJ)


def _local_blocks(view, block):
    """Ids of the blocks that some token of each query block always reads; -1 for none, repeats allowed."""
    low_BQ, first_BQ = view.low_BT[:, ::block, None], view.first_BT[:, ::block, None]
    last_BQ = view.own_BT[:, block - 1 :: block, None]
    reach = view.num_blocks + settings.more_reached(block, view.key_block)
    window = low_BQ + jnp.arange(reach, dtype=jnp.int32)
    sinks = first_BQ + jnp.arange(view.sink_blocks, dtype=jnp.int32)
    both = jnp.concatenate([window, sinks], -1)
    return jnp.where(both <= last_BQ, both, -1)


def _visible_choices(choice_BGTA, before_BGUA, block, open_tokens):
    """For each query block, the choices of its own tokens and of the open_tokens - 1 before them, oldest first."""
    T, before = choice_BGTA.shape[2], open_tokens - 1
    if before_BGUA is None:
        before_BGUA = jnp.full_like(
            choice_BGTA,
            -1,
            shape=(*choice_BGTA.shape[:2], before, choice_BGTA.shape[3]),
        )
    known = jnp.concatenate([before_BGUA, choice_BGTA], axis=2)
    token_QU = jnp.arange(0, T, block)[:, None] + jnp.arange(before + block)[None]
    return known[:, :, token_QU]


def _merge(key_BGQP, radix, length):
    """Unique ids of each row in order of opening, who opened them, and how many had no room.

    A key is id * radix + time of opening, time 0 for local blocks; negative keys are empty.
    """
    empty = jnp.iinfo(jnp.int32).max
    place = jnp.broadcast_to(
        jnp.arange(key_BGQP.shape[-1], dtype=jnp.int32), key_BGQP.shape
    )
    key_BGQP = jnp.sort(jnp.where(key_BGQP < 0, empty, key_BGQP), axis=-1)
    id_BGQP, time_BGQP = key_BGQP // radix, key_BGQP % radix
    real = key_BGQP < empty
    changes = id_BGQP[..., 1:] != id_BGQP[..., :-1]
    begins = real & jnp.concatenate([jnp.ones_like(changes[..., :1]), changes], axis=-1)

    # Room: runs are admitted in order of their first opening, all of one moment or none. Of one moment they are sorted by
    # id already, so places do for ids, which are longer: sorting takes time by the byte.
    num = key_BGQP.shape[-1]
    dtype = jnp.uint16 if radix * num < jnp.iinfo(jnp.uint16).max else jnp.int32
    nowhere = jnp.iinfo(dtype).max
    order = jnp.where(begins, time_BGQP * num + place, nowhere).astype(dtype)
    order = jnp.sort(order, axis=-1).astype(jnp.int32)
    missing = max(0, length + 1 - num)
    order = jnp.pad(order, ((0, 0),) * 3 + ((0, missing),), constant_values=nowhere)
    limit = order[..., length : length + 1] // num
    order = order[..., :length]
    admitted, source = order // num < limit, order % num
    refused_BGQ = begins.sum(-1, dtype=jnp.int32) - admitted.sum(-1, dtype=jnp.int32)

    # An opener's bit occurs once in a run, so the sum of a run's bits is their union; uint32 wraps without harm.
    following = jnp.where(begins | ~real, place, num)
    following = jnp.concatenate([following, jnp.full_like(place[..., :1], num)], -1)
    end = jnp.take_along_axis(
        lax.cummin(following, axis=3, reverse=True), source + 1, -1
    )
    words = []
    for word in range(2):
        bit = time_BGQP - 1 - 32 * word
        opens = real & (bit >= 0) & (bit < 32)
        bits = jnp.where(
            opens,
            jnp.uint32(1) << jnp.clip(bit, 0, 31).astype(jnp.uint32),
            jnp.uint32(0),
        )
        sums = jnp.pad(
            jnp.cumsum(bits, axis=-1, dtype=jnp.uint32), ((0, 0),) * 3 + ((1, 0),)
        )
        run = jnp.take_along_axis(sums, end, -1) - jnp.take_along_axis(sums, source, -1)
        words.append(jnp.where(admitted, run, jnp.uint32(0)))
    id_BGQJ = jnp.take_along_axis(id_BGQP, source, -1)
    return jnp.where(admitted, id_BGQJ, -1), words, refused_BGQ


def _stay_open(opener_bits, open_tokens, block):
    """Bits of openers, the oldest lowest, to bits of the query block's tokens for which the block is open."""
    low, high = opener_bits
    covered = 1
    while covered < open_tokens:
        step = min(covered, open_tokens - covered)
        high = high | (high << step) | (low >> (32 - step))
        low = low | (low << step)
        covered += step
    before = open_tokens - 1
    own = (low >> before) | (high << (32 - before)) if before else low
    return own & jnp.uint32(2**block - 1)


def _token_mask(id_BGQJ, opened_BGQJ, view, block):
    """Bit t: token t reads the block, by its own view or because it is open and belongs to its document."""
    B, _, Q, _ = id_BGQJ.shape

    def rows(value_BT):
        return jnp.broadcast_to(value_BT, (B, Q * block)).reshape(B, 1, Q, 1, block)

    id_BGQJ1 = id_BGQJ[..., None]
    first, own = rows(view.first_BT), rows(view.own_BT)
    bit = jnp.arange(block, dtype=jnp.uint32)
    is_open = ((opened_BGQJ[..., None] >> bit) & 1).astype(bool) & (id_BGQJ1 >= first)
    in_window = (id_BGQJ1 >= rows(view.low_BT)) & (id_BGQJ1 <= own)
    in_sinks = (
        (id_BGQJ1 >= first) & (id_BGQJ1 < first + view.sink_blocks) & (id_BGQJ1 <= own)
    )
    reads = (is_open | in_window | in_sinks) & (id_BGQJ1 >= 0)
    return jnp.where(reads, jnp.uint32(1) << bit, jnp.uint32(0)).sum(
        -1, dtype=jnp.uint32
    )
