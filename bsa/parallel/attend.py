"""Attention of whole arrays that lie on many devices. Called by `bsa.model.attention`; on one device, it is the kernel."""

import jax

from bsa.parallel import dense as dense_lib
from bsa.parallel import exchange, mesh, sparse
from pallas_kernels import dispatch, selection, shapes


def block_sparse_attention(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    lists: selection.BlockSelection,
    segment_id_BT,
    placement: mesh.Placement,
    *,
    scale: float,
    implementation: str,
    bias_BGTJ=None,
    mask_mod=None,
):
    """Causal attention of each query block over the key blocks listed for it, wherever they are.

    Args:
        lists: of the whole row; see `BlockSelection`.
        segment_id_BT: int32, documents of the row, each a run of tokens; no attention crosses them.
        bias_BGTJ, mask_mod: as in `dispatch.block_sparse_attention`; on one device a row only.
    Returns:
        out_BTHK in q's dtype; as on one device, but for rounding.
    Raises:
        ValueError: a `mask_mod` or bias for a row that lies on several devices.
    """
    shapes.check(
        q_BTHK=q_BTHK,
        k_BSGK=k_BSGK,
        v_BSGK=v_BSGK,
        segment_id_BT=segment_id_BT,
        bias_BGTJ=bias_BGTJ,
    )
    devices = placement.context
    if devices > 1 and (mask_mod is not None or bias_BGTJ is not None):
        raise ValueError(
            f"a sliding window or a bias over context={devices} devices is not supported; set mesh.context=1"
        )

    def attend_alone(q, k, v, lists, segment_id, bias_BGTJ=None):
        out, _ = dispatch.block_sparse_attention(
            q,
            k,
            v,
            lists,
            scale=scale,
            bias_BGTJ=bias_BGTJ,
            segment_ids=selection.SegmentIds(segment_id, segment_id),
            mask_mod=mask_mod,
            implementation=implementation,
        )
        return out

    def attend_shard(*arrays):
        if devices == 1:
            return attend_alone(*arrays)
        if placement.transport == "ring":
            rules = sparse.Rules(devices, scale, implementation)
            return sparse.attend_shard(*arrays, rules)
        shard_blocks = k_BSGK.shape[1] // devices // lists.key_block
        capacity = min(placement.capacity_blocks or shard_blocks, shard_blocks)
        rules = exchange.Rules(devices, scale, implementation, capacity)
        return exchange.attend_shard(*arrays, rules)

    axes = jax.tree.unflatten(
        jax.tree.structure(lists),
        ["BGQJ", "BGQ", "BGQJ"][: len(jax.tree.leaves(lists))],
    )
    arrays = [q_BTHK, k_BSGK, v_BSGK, lists, segment_id_BT]
    inputs = ["BTHK", "BSGK", "BSGK", axes, "BT"]
    if bias_BGTJ is not None:
        arrays, inputs = [*arrays, bias_BGTJ], [*inputs, "BGTJ"]
    return placement.run_on_shards(attend_shard, inputs=tuple(inputs), outputs="BTHK")(
        *arrays
    )


def dense(
    q_BTHK, k_BSGK, v_BSGK, segment_id_BT, placement: mesh.Placement, *, scale: float
):
    """Causal attention to every earlier token of the same document, over more than one device a row."""
    shapes.check(
        q_BTHK=q_BTHK, k_BSGK=k_BSGK, v_BSGK=v_BSGK, segment_id_BT=segment_id_BT
    )

    def attend_shard(*arrays):
        return dense_lib.attend_shard(*arrays, devices=placement.context, scale=scale)

    return placement.run_on_shards(
        attend_shard, inputs=("BTHK", "BSGK", "BSGK", "BT"), outputs="BTHK"
    )(q_BTHK, k_BSGK, v_BSGK, segment_id_BT)
