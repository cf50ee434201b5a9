"""Only what somebody listed is sent: the `exchange` transport of block-sparse attention. Called by `attend`.

Each device asks the devices before it for the blocks that its lists name, each block once. An answer has room for
`capacity_blocks`. What comes in the first round is read in one pass with the device's own keys, and backward keeps it; if
anybody wants more, there are more rounds, whose results are merged by lse, so nothing is dropped; each costs a pass over
all queries, and the merged result and the gradient of queries are rounded once more, so room for a round should be ample.

Blocks are served in the order in which the lists first name them: so which round a token's blocks come in, and with it how
its sums are rounded, depends on earlier tokens only. Of what lies before a device, its tokens can read one document alone,
the one that its first token belongs to; the block in which that one begins, if it does so inside a block, has the same
place in every head's answer, so that segment ids are the same for all heads. Gradients of the blocks go back the way
they came.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from bsa.parallel import delivery, merge, mesh, sparse
from pallas_kernels import dispatch, selection

NEVER = jnp.iinfo(jnp.int32).max
"""An entry past all entries."""


@dataclasses.dataclass(frozen=True)
class Rules(sparse.Rules):
    """`capacity_blocks`: blocks that a device gets from each other one in a round."""

    capacity_blocks: int


def attend_shard(q_BTHK, k_BSGK, v_BSGK, lists, segment_id_BT, rules: Rules):
    """Attention of this device's queries over lists of blocks of the whole row."""
    plan = _plan(rules, lists, segment_id_BT)
    return _exchange(rules, q_BTHK, k_BSGK, v_BSGK, plan)


def count_blocks(lists: selection.BlockSelection, devices: int):
    """Blocks that each device wants of each one before it, for each row and head: int32[B, G, devices, devices].

    Args:
        lists: of all devices.
    """
    B, G, Q, _ = lists.block_id_BGQJ.shape
    num = Q * lists.query_block // lists.key_block
    parts = jax.tree.map(
        lambda x: x.reshape(B, G, devices, Q // devices, *x.shape[3:]), lists
    )
    first_named = functools.partial(_first_named, num_blocks=num, end=num)
    first = jax.vmap(first_named, in_axes=2, out_axes=2)(parts)
    wants = first < NEVER
    count = wants.reshape(B, G, devices, devices, -1).sum(-1, dtype=jnp.int32)
    return jnp.tril(count, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Who gets what when. [B, G, devices, N] speaks of the N blocks of each device.

    Attributes:
        rank: int32[B, G, devices, N], the place of a wanted block among those wanted of its owner, -1 for others.
        rounds: int32, the same on all devices of the mesh.
        lists: of this device's queries.
        segment_id_BT: of this device's tokens.
        start_B: int32, where the document begins that this device's first token belongs to.
    """

    rank: jax.Array
    rounds: jax.Array
    lists: selection.BlockSelection
    segment_id_BT: jax.Array
    start_B: jax.Array


def _first_named(lists, num_blocks, end):
    """int32[B, G, num_blocks]: which entry, of all lists of a head, names each block before `end` first; or `NEVER`."""
    B, G = lists.block_id_BGQJ.shape[:2]
    block_id = lists.block_id_BGQJ
    is_before = sparse.listed(lists) & (block_id < end)
    block_id = jnp.where(is_before, block_id, num_blocks).reshape(B, G, -1)
    first = jnp.full((B, G, num_blocks), NEVER, jnp.int32)
    entry = jnp.arange(block_id.shape[2], dtype=jnp.int32)
    row, head, _ = jnp.indices((B, G, 1), sparse=True)
    return first.at[row, head, block_id].min(entry, mode="drop")


def _plan(rules, lists, segment_id_BT):
    B, T = segment_id_BT.shape
    C, devices, own = lists.key_block, rules.devices, lax.axis_index("context")
    segment_id_BS = lax.all_gather(segment_id_BT, "context", axis=1, tiled=True)
    token = jnp.arange(devices * T, dtype=jnp.int32)
    is_other_BS = (segment_id_BS != segment_id_BT[:, :1]) & (token < own * T)
    start_B = jnp.where(is_other_BS, token + 1, 0).max(1)

    # Later devices and other documents are not read. A block that is read in part comes first, for all heads.
    begin_B1 = start_B[:, None] // C
    block = jnp.arange(devices * T // C, dtype=jnp.int32)
    is_edge_BN = (start_B[:, None] % C > 0) & (block == begin_B1)
    first = _first_named(lists, block.size, end=own * (T // C))
    first = jnp.where((block >= begin_B1)[:, None], first, NEVER)
    first = jnp.where(is_edge_BN[:, None], -1, first)
    first = first.reshape(B, -1, devices, T // C)
    order = jnp.argsort(first, axis=3)
    place = jnp.broadcast_to(jnp.arange(T // C, dtype=jnp.int32), first.shape)
    rank = jnp.put_along_axis(place, order, place, axis=3, inplace=False)
    rank = jnp.where(first < NEVER, rank, -1)
    rounds = lax.pmax(rank.max() // rules.capacity_blocks + 1, mesh.MESH_AXES)
    return _Plan(rank, jnp.maximum(rounds, 1), lists, segment_id_BT, start_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(rules, q_BTHK, k_BSGK, v_BSGK, plan):
    """All rounds."""
    _, *fetched = _fetch(rules, plan, 0, k_BSGK, v_BSGK)
    first = _attend(rules, plan, q_BTHK, *fetched)
    return _read_rest(rules, first, q_BTHK, k_BSGK, v_BSGK, plan)[0]


def _read_rest(rules, first, q_BTHK, k_BSGK, v_BSGK, plan):
    """The result over all rounds from that of the first; between rounds it is kept in q's dtype, in place."""

    def round_(i, whole):
        _, *fetched = _fetch(rules, plan, i, k_BSGK, v_BSGK)
        out, lse = merge.merge(whole, _attend(rules, plan, q_BTHK, *fetched))
        return out.astype(q_BTHK.dtype), lse

    return lax.fori_loop(1, plan.rounds, round_, first)


def _forward(rules, q_BTHK, k_BSGK, v_BSGK, plan):
    asked, *keys, local = _fetch(rules, plan, 0, k_BSGK, v_BSGK)
    attend = functools.partial(_attend, rules, plan, local=local)
    first, pull = jax.vjp(attend, q_BTHK, *keys)
    whole = _read_rest(rules, first, q_BTHK, k_BSGK, v_BSGK, plan)
    return whole[0], (q_BTHK, k_BSGK, v_BSGK, plan, asked, first, pull, whole)


def _backward(rules, saved, d_out_BTHK):
    """Sends the gradients of what was fetched back; later rounds are fetched again."""
    q_BTHK, k_BSGK, v_BSGK, plan, asked, first, pull, whole = saved
    cotangents, C = (d_out_BTHK, jnp.zeros_like(whole[1])), plan.lists.key_block
    share_BTH1, d_lse_BHT = lax.cond(
        plan.rounds > 1,
        lambda: merge.part_share(whole, first, cotangents),
        lambda: (jnp.ones((*q_BTHK.shape[:3], 1)), cotangents[1]),
    )
    d_first = (share_BTH1 * d_out_BTHK).astype(q_BTHK.dtype), d_lse_BHT
    d_q, *d_blocks = pull(d_first)
    d_keys = [delivery.send_home(d, asked, C) for d in d_blocks]

    def round_(i, totals):
        asked, *keys, local = _fetch(rules, plan, i, k_BSGK, v_BSGK)
        attend = functools.partial(_attend, rules, plan, local=local)
        part, pull = jax.vjp(attend, q_BTHK, *keys)
        d_q, *d_blocks = pull(merge.part_cotangents(whole, part, cotangents))
        d_keys = [delivery.send_home(d, asked, C) for d in d_blocks]
        return jax.tree.map(jnp.add, totals, (d_q, *d_keys))

    d_q, *d_keys = lax.fori_loop(1, plan.rounds, round_, (d_q, *d_keys))
    return d_q, *(d.astype(k_BSGK.dtype) for d in d_keys), None


_exchange.defvjp(_forward, _backward)


def _this_round(rules, plan, number):
    """Places in the answers of this round, the capacity for blocks that are not in it."""
    place = plan.rank - number * rules.capacity_blocks
    in_round = (plan.rank >= 0) & (place >= 0) & (place < rules.capacity_blocks)
    return jnp.where(in_round, place, rules.capacity_blocks)


def _fetch(rules, plan, number, k_BSGK, v_BSGK):
    """Blocks of the devices 1, 2, .. before this one, with room for `capacity_blocks` each, and then all of its own.

    Barriers keep the compiler to an order in which little waits: lists are translated while k travels, and own keys are
    copied while v does.

    Returns:
        asked: see `delivery`.
        k_BSGK, v_BSGK: of more tokens.
        local: lists and segments of these tokens, see `_translate`.
    """
    B, G, devices, N = plan.rank.shape
    place = _this_round(rules, plan, number)
    request = jnp.full((B, G, devices, rules.capacity_blocks), N, jnp.int32)
    row, head, owner, block = jnp.indices(place.shape, sparse=True)
    request = request.at[row, head, owner, place].set(block, mode="drop")
    asked = lax.all_to_all(request, "context", 2, 2, tiled=True)

    answers = delivery.answers(k_BSGK, asked, plan.lists.key_block)
    answers, asked, rank = lax.optimization_barrier((answers, asked, plan.rank))
    arrived_k = delivery.send(answers)
    local = _translate(rules, dataclasses.replace(plan, rank=rank), number)
    answers = delivery.answers(v_BSGK, asked, plan.lists.key_block)
    arrived_k, answers, local = lax.optimization_barrier((arrived_k, answers, local))
    arrived_v = delivery.send(answers)
    keys = delivery.join(arrived_k, k_BSGK), delivery.join(arrived_v, v_BSGK)
    return asked, *keys, local


def _translate(rules, plan, number):
    """The lists, by the places of blocks in what `_fetch` brings, and the segments of its tokens."""
    lists, devices, own = plan.lists, rules.devices, lax.axis_index("context")
    (B, T), C = plan.segment_id_BT.shape, lists.key_block
    num_arrived = (devices - 1) * rules.capacity_blocks
    place = _this_round(rules, plan, number)
    shift = (own - jnp.arange(devices)) % devices
    slot = (shift[:, None] - 1) * rules.capacity_blocks + place
    slot = jnp.where(place < rules.capacity_blocks, slot, -1)
    own_slots = num_arrived + jnp.arange(T // C, dtype=jnp.int32)
    own_slots = jnp.where(number == 0, own_slots, -1)
    slot_BGN = jnp.where(shift[:, None] == 0, own_slots, slot).reshape(
        *slot.shape[:2], -1
    )

    # What arrived is of the first token's document, but for a part of the block in which that begins.
    begin_B1 = plan.start_B[:, None] // C
    edge_slot_B1 = jnp.take_along_axis(slot_BGN[:, 0], begin_B1, axis=1)
    is_before_BSC = (jnp.arange(num_arrived) == edge_slot_B1)[..., None] & (
        jnp.arange(C) < plan.start_B[:, None, None] % C
    )
    arrived_BSC = jnp.where(is_before_BSC, NEVER, plan.segment_id_BT[:, :1, None])
    key_segment_BS = [arrived_BSC.reshape(B, -1), plan.segment_id_BT]
    key_segment_BS = jnp.concatenate(key_segment_BS, axis=1)

    listed = sparse.listed(lists)
    block_id = jnp.where(listed, lists.block_id_BGQJ, 0)
    new_id = jax.vmap(jax.vmap(lambda slot_N, id: slot_N[id]))(slot_BGN, block_id)
    return sparse.keep(lists, jnp.where(listed, new_id, -1)), key_segment_BS


def _attend(rules, plan, q_BTHK, k_BSGK, v_BSGK, local):
    """Attention to what `_fetch` brought. Own blocks stand last, at their true places, so causality holds as it is."""
    (lists, key_segment_BS), own = local, lax.axis_index("context")
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    return dispatch.block_sparse_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        lists,
        scale=rules.scale,
        segment_ids=selection.SegmentIds(plan.segment_id_BT, key_segment_BS),
        query_offset=own * T,
        key_offset=own * T - (S - T),
        implementation=rules.implementation,
    )
