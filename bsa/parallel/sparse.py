"""Listed blocks among visiting keys: the `ring` transport of block-sparse attention. Called by `attend`.

All keys pass by every device, which reads the blocks that its lists name. A visitor that no list names costs no
attention, only its way.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from bsa.parallel import merge, ring
from pallas_kernels import dispatch, selection


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is known when tracing.

    Attributes:
        devices: along "context".
        scale, implementation: as in `dispatch.block_sparse_attention`.
    """

    devices: int
    scale: float
    implementation: str


def attend_shard(q_BTHK, k_BSGK, v_BSGK, lists, segment_id_BT, rules: Rules):
    """Attention of this device's queries over lists of blocks of the whole row."""
    segment_id_BS = lax.all_gather(segment_id_BT, "context", axis=1, tiled=True)
    meet = functools.partial(_meet, rules)
    fixed = lists, segment_id_BT, segment_id_BS
    out_BTHK, _ = ring.visit(meet, rules.devices, q_BTHK, k_BSGK, v_BSGK, fixed)
    return out_BTHK


def keep(lists: selection.BlockSelection, new_id_BGQJ) -> selection.BlockSelection:
    """The lists with new ids, without the entries whose id is now -1; the others keep their order."""
    stays_BGQJ = new_id_BGQJ >= 0
    place_J = jnp.arange(new_id_BGQJ.shape[-1], dtype=jnp.int32)
    key_BGQJ = jnp.where(stays_BGQJ, 0, place_J.size) + place_J
    masks = () if lists.token_mask_BGQJ is None else (lists.token_mask_BGQJ,)
    operands = key_BGQJ, new_id_BGQJ, *masks
    # Keys are distinct; a stable sort would carry one operand more.
    _, block_id_BGQJ, *masks = lax.sort(operands, num_keys=1, is_stable=False)
    return dataclasses.replace(
        lists,
        block_id_BGQJ=block_id_BGQJ,
        count_BGQ=stays_BGQJ.sum(-1, dtype=jnp.int32),
        token_mask_BGQJ=masks[0] if masks else None,
    )


def listed(lists: selection.BlockSelection):
    """bool, which entries of the lists are real."""
    place_J = jnp.arange(lists.block_id_BGQJ.shape[-1])
    return place_J < lists.count_BGQ[..., None]


def _meet(rules, q_BTHK, k_BSGK, v_BSGK, owner, fixed):
    """Attention to the listed blocks of one visitor."""
    lists, query_BT, segment_id_BS = fixed
    T, own = q_BTHK.shape[1], lax.axis_index("context")
    first, num = owner * (T // lists.key_block), T // lists.key_block
    id_BGQJ = lists.block_id_BGQJ - first
    visits = listed(lists) & (id_BGQJ >= 0) & (id_BGQJ < num)
    lists = keep(lists, jnp.where(visits, id_BGQJ, -1))
    key_BS = lax.dynamic_slice_in_dim(segment_id_BS, owner * T, T, axis=1)

    def attend(q, k, v):
        return dispatch.block_sparse_attention(
            q,
            k,
            v,
            lists,
            scale=rules.scale,
            segment_ids=selection.SegmentIds(query_BT, key_BS),
            query_offset=own * T,
            key_offset=owner * T,
            implementation=rules.implementation,
        )

    def skip(q, k, v):
        out, lse = merge.nothing(q)
        return out.astype(q.dtype), lse

    return lax.cond(visits.any(), attend, skip, q_BTHK, k_BSGK, v_BSGK)
