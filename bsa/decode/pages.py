"""Which blocks of a bookmark layer are still kept, where only so many may be. Called by `cache`, `attend`.

A new block takes the slot of the one that nobody has chosen for longest; sinks, window and what the last tokens chose
stay. The bookmark of a block that went stays too, but who chooses it reads nothing there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Where each block lies; S counts slots here.

    Attributes:
        slot_BGN: int32, slot of each block of the text; -1: not there yet, or no longer.
        owner_BGS: int32, block in each slot; -1: none.
        used_BGS: int32, place of the last token that chose the block in each slot, or of the block's first token.
    """

    slot_BGN: jax.Array
    owner_BGS: jax.Array
    used_BGS: jax.Array


def empty(batch: int, groups: int, num_blocks: int, num_slots: int) -> Pages:
    """No block kept."""
    sizes = (num_blocks, num_slots, num_slots)
    return Pages(*(jnp.full((batch, groups, size), -1, jnp.int32) for size in sizes))


def admit(pages: Pages, place_BT, count_B, view_low_B, sink_blocks: int, C: int):
    """Gives slots to the blocks that new tokens begin.

    Args:
        place_BT: places of the new tokens, which follow each other; the first `count` are real.
        view_low_B: first block of the first new token's window.
    """
    shapes.check(place_BT=place_BT, count_B=count_B, view_low_B=view_low_B)
    num = place_BT.shape[1] // C + 1
    first_B = -(-place_BT[:, 0] // C)
    last_B = (place_BT[:, 0] + count_B - 1) // C
    new_BN = first_B[:, None] + jnp.arange(num, dtype=jnp.int32)
    is_new_BN = (new_BN <= last_B[:, None]) & (count_B > 0)[:, None]

    def of_group(pages, new_N, is_new_N, low):
        owner_S = pages.owner_BGS
        is_fixed = (owner_S >= low) | ((owner_S >= 0) & (owner_S < sink_blocks))
        rank_S = jnp.where(is_fixed, jnp.iinfo(jnp.int32).max, pages.used_BGS)
        _, slot_N = lax.top_k(-rank_S, num)
        slot_N = jnp.where(is_new_N, slot_N, owner_S.shape[0])
        past = pages.slot_BGN.shape[0]
        gone_N = owner_S.at[slot_N].get(mode="fill", fill_value=past)
        gone_N = jnp.where(gone_N < 0, past, gone_N)
        slot_of = pages.slot_BGN.at[gone_N].set(-1, mode="drop")
        return Pages(
            slot_of.at[jnp.where(is_new_N, new_N, past)].set(slot_N, mode="drop"),
            owner_S.at[slot_N].set(new_N, mode="drop"),
            pages.used_BGS.at[slot_N].set(new_N * C, mode="drop"),
        )

    of_row = jax.vmap(of_group, in_axes=(0, None, None, None))
    return jax.vmap(of_row)(pages, new_BN, is_new_BN, view_low_B)


def slots(pages: Pages, block_id):
    """Slots of blocks [B, G, ...]; -1 for those that are not kept, and for ids of none."""

    def of_group(slot_N, block_id):
        return jnp.where(block_id < 0, -1, slot_N[block_id])

    return jax.vmap(jax.vmap(of_group))(pages.slot_BGN, block_id)


def touch(pages: Pages, choice_BGTA, place_BT, is_real_BT) -> Pages:
    """Notes who chose what and when; choices are of blocks that are kept, or -1."""
    num_slots = pages.used_BGS.shape[2]
    slot_BGTA = slots(pages, choice_BGTA)
    is_choice = (slot_BGTA >= 0) & is_real_BT[:, None, :, None]
    slot_BGTA = jnp.where(is_choice, slot_BGTA, num_slots)

    def of_group(used_S, slot_TA, place_T):
        place_TA = jnp.broadcast_to(place_T[:, None], slot_TA.shape)
        return used_S.at[slot_TA].max(place_TA, mode="drop")

    of_row = jax.vmap(of_group, in_axes=(0, 0, None))
    used_BGS = jax.vmap(of_row)(pages.used_BGS, slot_BGTA, place_BT)
    return dataclasses.replace(pages, used_BGS=used_BGS)
