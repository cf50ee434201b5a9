"""Only what somebody listed is sent: the `exchange` transport of block-sparse attention. Called by `attend`.

Each device asks the devices before it for the blocks that its lists name, each block once. An answer has room for
`capacity_blocks`; if anybody wants more, there are more rounds, whose results are merged by lse, so nothing is dropped.
Blocks are served in the order in which the lists first name them: so which round a token's blocks come in, and with it how
its sums are rounded, depends on earlier tokens only. Gradients of the blocks go back the way they came. Rows and key/value heads are treated alike, as rows of one head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from bsa.parallel import merge, mesh, sparse
from pallas_kernels import dispatch, selection

NEVER = jnp.iinfo(jnp.int32).max
"""An entry past all entries."""


@dataclasses.dataclass(frozen=True)
class Rules(sparse.Rules):
    """`capacity_blocks`: blocks that a device gets from each other one in a round."""

    capacity_blocks: int


def attend_shard(q_BTHK, k_BSGK, v_BSGK, lists, segment_id_BT, rules: Rules):
    """Attention of this device's queries over lists of blocks of the whole row."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]

    def heads_to_rows(x_BTGK):
        return x_BTGK.swapaxes(1, 2).reshape(B * G, T, -1, K)

    q = heads_to_rows(q_BTHK.reshape(B, T, G, -1))
    lists = jax.tree.map(lambda x: x.reshape(B * G, 1, *x.shape[2:]), lists)
    segment_id_BT = jnp.repeat(segment_id_BT, G, axis=0)
    segment_id_BS = lax.all_gather(segment_id_BT, "context", axis=1, tiled=True)
    fixed = lists, segment_id_BT, segment_id_BS
    out, _ = _exchange(
        rules, q, heads_to_rows(k_BSGK), heads_to_rows(v_BSGK), _plan(rules, fixed)
    )
    return out.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)


def count_blocks(lists: selection.BlockSelection, devices: int):
    """Blocks that each device wants of each one before it, for each row and head: int32[B, G, devices, devices].

    Args:
        lists: of all devices.
    """
    B, G, Q, _ = lists.block_id_BGQJ.shape
    num = Q * lists.query_block // lists.key_block
    parts = jax.tree.map(
        lambda x: x.reshape(B * G, devices, Q // devices, *x.shape[3:]), lists
    )
    first = jax.vmap(lambda part: _first_named(part, num), in_axes=1, out_axes=1)(
        jax.tree.map(lambda x: x[:, :, None], parts)
    )
    wants = first < NEVER
    count = wants.reshape(B, G, devices, devices, -1).sum(-1, dtype=jnp.int32)
    return jnp.tril(count, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Who gets what when. [rows, devices, N] speaks of the N blocks of each device.

    Attributes:
        rank: int32[rows, devices, N], the place of a wanted block among those wanted of its owner, -1 for others.
        rounds: int32, the same on all devices of the mesh.
        fixed: lists, and segment ids of this device and of the whole row.
    """

    rank: jax.Array
    rounds: jax.Array
    fixed: tuple


def _first_named(lists, num_blocks):
    """int32[rows, blocks of the whole row]: which entry, of all lists in a row, names each block first; or `NEVER`."""
    rows = lists.block_id_BGQJ.shape[0]
    block_id = jnp.where(sparse.listed(lists), lists.block_id_BGQJ, num_blocks)
    block_id = block_id.reshape(rows, -1)
    first = jnp.full((rows, num_blocks), NEVER, jnp.int32)
    entry = jnp.arange(block_id.shape[1], dtype=jnp.int32)
    return first.at[jnp.arange(rows)[:, None], block_id].min(entry, mode="drop")


def _plan(rules, fixed):
    lists, _, segment_id_BS = fixed
    rows, S = segment_id_BS.shape
    first = _first_named(lists, S // lists.key_block).reshape(rows, rules.devices, -1)
    # Blocks of later devices are not read: attention is causal.
    is_before = jnp.arange(rules.devices) < lax.axis_index("context")
    wanted = (first < NEVER) & is_before[:, None]
    order = jnp.argsort(first, axis=2)
    place = jnp.broadcast_to(jnp.arange(first.shape[2], dtype=jnp.int32), first.shape)
    rank = jnp.put_along_axis(place, order, place, axis=2, inplace=False)
    rank = jnp.where(wanted, rank, -1)
    rounds = lax.pmax(rank.max() // rules.capacity_blocks + 1, mesh.MESH_AXES)
    return _Plan(rank, jnp.maximum(rounds, 1), fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(rules, q_BTHK, k_BSGK, v_BSGK, plan):
    """All rounds; rows of one key/value head."""

    def round_(i, whole):
        blocks = _fetch(rules, plan, i, (k_BSGK, v_BSGK))
        return merge.merge(whole, _attend(rules, plan, i, q_BTHK, *blocks))

    out_BTHK, lse_BHT = lax.fori_loop(0, plan.rounds, round_, merge.nothing(q_BTHK))
    return out_BTHK.astype(q_BTHK.dtype), lse_BHT


def _forward(rules, q_BTHK, k_BSGK, v_BSGK, plan):
    whole = _exchange(rules, q_BTHK, k_BSGK, v_BSGK, plan)
    return whole, (q_BTHK, k_BSGK, v_BSGK, plan, whole)


def _backward(rules, saved, cotangents):
    """Fetches again, round by round, and sends the gradients of what was fetched back."""
    q_BTHK, k_BSGK, v_BSGK, plan, whole = saved
    inputs = q_BTHK, k_BSGK, v_BSGK

    def round_(i, totals):
        blocks, send_back = jax.vjp(
            lambda *keys: _fetch(rules, plan, i, keys), k_BSGK, v_BSGK
        )
        part, pull = jax.vjp(
            functools.partial(_attend, rules, plan, i), q_BTHK, *blocks
        )
        d_q, *d_blocks = pull(merge.part_cotangents(whole, part, cotangents))
        d_keys = send_back(tuple(d_blocks))
        return jax.tree.map(jnp.add, totals, (d_q, *d_keys))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), inputs)
    totals = lax.fori_loop(0, plan.rounds, round_, zeros)
    return *jax.tree.map(lambda d, x: d.astype(x.dtype), totals, inputs), None


_exchange.defvjp(_forward, _backward)


def _this_round(rules, plan, number):
    """Places in the answers of this round, the capacity for blocks that are not in it."""
    place = plan.rank - number * rules.capacity_blocks
    in_round = (plan.rank >= 0) & (place >= 0) & (place < rules.capacity_blocks)
    return jnp.where(in_round, place, rules.capacity_blocks)


def _fetch(rules, plan, number, keys):
    """Blocks of the devices 1, 2, .. before this one, with room for `capacity_blocks` each, and then all of its own.

    Linear in `keys`, a pair of [rows, T, 1, K]; returned are as many rows of more tokens.
    """
    devices, own = rules.devices, lax.axis_index("context")
    rows, _, N = plan.rank.shape
    place = _this_round(rules, plan, number)
    request = jnp.zeros((rows, devices, rules.capacity_blocks), jnp.int32)
    row, owner, block = jnp.indices(place.shape, sparse=True)
    request = request.at[row, owner, place].set(block, mode="drop")
    asked = lax.all_to_all(request, "context", 1, 1, tiled=True)

    blocks = jnp.stack(keys)
    blocks = blocks.reshape(2, rows, N, -1, *blocks.shape[3:])
    answers = jax.vmap(jax.vmap(lambda x, i: x[i]), in_axes=(0, None))(blocks, asked)
    arrived = []
    for shift in range(1, devices):
        answer = lax.dynamic_index_in_dim(answers, (own + shift) % devices, 2, False)
        pairs = [(i, i + shift) for i in range(devices - shift)]
        arrived.append(lax.ppermute(answer, "context", pairs))
    known = jnp.concatenate([*arrived, blocks], axis=2)
    return tuple(known.reshape(2, rows, -1, *known.shape[4:]))


def _attend(rules, plan, number, q_BTHK, k_BSGK, v_BSGK):
    """Attention to what `_fetch` brought. Own blocks stand last, at their true places, so causality holds as it is."""
    lists, query_BT, segment_id_BS = plan.fixed
    devices, own = rules.devices, lax.axis_index("context")
    rows, _, N = plan.rank.shape
    own_slot = (devices - 1) * rules.capacity_blocks
    place = _this_round(rules, plan, number)
    shift = (own - jnp.arange(devices)) % devices
    slot = (shift[:, None] - 1) * rules.capacity_blocks + place
    slot = jnp.where(place < rules.capacity_blocks, slot, -1)
    own_slots = jnp.where(number == 0, own_slot + jnp.arange(N, dtype=jnp.int32), -1)
    slot = jnp.where(shift[:, None] == 0, own_slots, slot).reshape(rows, -1)

    # Segment ids of the blocks; what a free place holds is read by nobody.
    row = jnp.arange(rows)[:, None]
    segment = segment_id_BS.reshape(rows, devices * N, lists.key_block)
    key_segment = jnp.zeros((rows, own_slot + N, lists.key_block), jnp.int32)
    taken = jnp.where(slot < 0, own_slot + N, slot)
    key_segment = key_segment.at[row, taken].set(segment, mode="drop")

    block_id = jnp.where(sparse.listed(lists), lists.block_id_BGQJ, 0)
    new_id = jax.vmap(lambda slot_N, id: slot_N[id])(slot, block_id)
    T = q_BTHK.shape[1]
    return dispatch.block_sparse_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        sparse.keep(lists, jnp.where(sparse.listed(lists), new_id, -1)),
        scale=rules.scale,
        segment_ids=selection.SegmentIds(query_BT, key_segment.reshape(rows, -1)),
        query_offset=own * T,
        key_offset=own * T - own_slot * lists.key_block,
        implementation=rules.implementation,
    )
