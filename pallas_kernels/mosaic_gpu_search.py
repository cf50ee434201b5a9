"""The nodes of an index that each query likes best, on Hopper GPUs: scores stay on the chip. Called by `bsa.index.kernel`.

A node is a mixture of R points with counts, and its score the logarithm of the attention mass that they promise, or that the
best of them does. Points may stand for Gaussians as wide in all directions: half the query's square, times the point's
variance, joins the product. Queries that look at some groups of nodes only share, 64 neighbours each, the tiles of all
groups that one of them looks at.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import (
    mosaic_gpu,
    mosaic_gpu_best,
    mosaic_gpu_operands,
    mosaic_gpu_plan,
    mosaic_gpu_rank,
    shapes,
)

MAX_STAGES = 4
SHARED_BYTES = 224 * 2**10
"""Of a thread block, but for barriers."""
MAX_RANKS = 32
"""Most nodes that are found for a query."""
MAX_ROWS = 256
"""Points of a tile: a copy's rows."""
MAX_NODES = 2**24
"""Ids are counted in float32."""


def find(
    q_BTGK,
    point_BGMRK,
    log_count_BGMR,
    low_BT,
    high_BT,
    num,
    *,
    groups=None,
    widths=None,
    point_pool="logsumexp",
    interpret=None,
):
    """The `num` nodes in [low, high) with the highest scores for each query.

    Args:
        q_BTGK: float, one query a key/value head, times the scale; read as bfloat16.
        point_BGMRK: float, read as bfloat16.
        log_count_BGMR: float32, natural log; -inf for a point that isn't there.
        groups: None: a query looks at all these nodes. Else group_BGTX, int32, and how many consecutive nodes are a
            group: it looks at those of its groups only; -1 is none.
        widths: square_BTG and spread_BGMR, float32, whose product joins that of query and point; None: nothing does.
        point_pool: "logsumexp", or "max": a node is worth its best point. Exponentials take most of the time otherwise.
        interpret: as in `mosaic_gpu.attend`.
    Returns:
        id_BGTA: int32, best first, equal ones by id; -1 after the last that scores more than -inf.
    Raises:
        NotImplementedError: not a Hopper GPU, or sizes that the kernel lacks.
    """
    if interpret is None:
        mosaic_gpu.check_device(jax.devices()[0])
    group_BGTX, group = groups or (None, None)
    square_BTG, spread_BGMR = widths or (None, None)
    sizes = shapes.check(
        q_BTGK=q_BTGK,
        point_BGMRK=point_BGMRK,
        log_count_BGMR=log_count_BGMR,
        low_BT=low_BT,
        high_BT=high_BT,
        group_BGTX=group_BGTX,
        square_BTG=square_BTG,
        spread_BGMR=spread_BGMR,
    )
    B, T, G, K, M, R = (sizes[letter] for letter in "BTGKMR")
    X = 0 if group_BGTX is None else group_BGTX.shape[3]
    if not fits(K, M, R, num, group, X):
        raise NotImplementedError(
            f"mosaic_gpu finds no {num} of M={M} nodes of R={R} points of width K={K} in groups of {group}: "
            f"{mosaic_gpu_operands.INSTEAD}"
        )
    nodes = _choose_nodes(R, K, num, group, X)
    inputs = _prepare(
        *(q_BTGK, point_BGMRK, log_count_BGMR, low_BT, high_BT),
        *(groups, widths, nodes),
    )
    plan = mosaic_gpu_rank.Plan(
        *(B, G, inputs.q_BTGK.shape[1], R, K),
        X=X,
        J=0 if group_BGTX is None else inputs.list_BGQJ.shape[3],
        num=num,
        nodes=nodes,
        parts=(group or nodes) // nodes,
        stages=_count_stages(R, K, nodes, num, X),
        point_pool=point_pool,
    )
    id_BGAT, score_BGAT = mosaic_gpu_rank.run(plan, inputs, interpret)
    is_node = score_BGAT > mosaic_gpu_best.LOWEST / 2
    id_BGAT = jnp.where(is_node, id_BGAT, -1).astype(jnp.int32)
    return id_BGAT[..., :T].swapaxes(2, 3)


def fits(K, M, R, num, group=None, X=0):
    """Whether the kernel can find `num` of M nodes of R points of width K, all of them or of X groups of so many."""
    is_size = K in mosaic_gpu_operands.WIDTHS and M <= MAX_NODES and num <= MAX_RANKS
    return is_size and _choose_nodes(R, K, num, group, X) is not None


def _prepare(
    q_BTGK, point_BGMRK, log_count_BGMR, low_BT, high_BT, groups, widths, nodes
):
    """The kernel's inputs: queries in whole thread blocks, points in tiles of so many nodes; arguments as for `find`."""
    B, G, M, R, _ = point_BGMRK.shape
    program_tokens = _program_tokens(groups is not None)
    tokens = mosaic_gpu_operands.round_up(q_BTGK.shape[1], program_tokens)
    pad = mosaic_gpu_operands.pad
    low_BT, high_BT = (pad(x, {1: tokens}) for x in (low_BT, high_BT))
    group_BGTX, group = groups or (None, nodes)
    begin_BQ = list_BGQJ = group_BGXT = None
    if group_BGTX is None:
        begin_BQ, steps_BGQ = _list_tiles(low_BT, high_BT, program_tokens, nodes, G)
    else:
        group_BGTX = pad(group_BGTX, {2: tokens}, -1)
        list_BGQJ, count_BGQ = _unite(group_BGTX, -(-M // group))
        steps_BGQ = count_BGQ * (group // nodes)
        group_BGXT = group_BGTX.swapaxes(2, 3)

    def cut(x, value=0):
        x = pad(x, {2: mosaic_gpu_operands.round_up(M, group)}, value)
        x = x.reshape(B, G, -1, nodes, *x.shape[3:]).swapaxes(3, 4)
        return x.reshape(B, G, -1, R * nodes, *x.shape[5:])

    log_count = jnp.maximum(log_count_BGMR, mosaic_gpu_best.LOWEST)
    spread = square_BGT = None
    if widths is not None:
        square_BTG, spread_BGMR = widths
        spread = cut(spread_BGMR)
        square_BGT = pad(square_BTG, {1: tokens}).swapaxes(1, 2)
        square_BGT *= mosaic_gpu_plan.LOG2E
    return mosaic_gpu_rank.Inputs(
        pad(q_BTGK.astype(jnp.bfloat16), {1: tokens}),
        cut(point_BGMRK.astype(jnp.bfloat16)),
        cut(log_count * mosaic_gpu_plan.LOG2E, mosaic_gpu_best.LOWEST),
        *(low_BT, high_BT, begin_BQ, steps_BGQ, group_BGXT, list_BGQJ),
        *(spread, square_BGT),
    )


def _choose_nodes(R, K, num, group, X):
    """Nodes of a tile: the most whose points are joined at once. None if no tiles make up a group, or find room."""
    sizes = [
        x
        for x in mosaic_gpu_best.DEPTHS
        if (group or x) % x == 0
        and R * x <= MAX_ROWS
        and _count_stages(R, K, x, num, X)
    ]
    joined = [x for x in sizes if R * x <= mosaic_gpu_best.PRODUCTS]
    return next(iter(joined + sizes[-1:]), None)


def _count_stages(R, K, nodes, num, X):
    """Of a ring: the consumers share one, or have one each if their queries look at X groups each; 0: no room."""
    consumers = mosaic_gpu_rank.count_consumers(X > 0)
    rings = consumers if X else 1
    looks = -(-num // min(num, mosaic_gpu_best.DEPTHS[nodes]))
    # A query: its vector, bounds, square, ranks, doubts and groups. A tile: points, counts and spreads.
    row_bytes = 2 * K + 12 + 8 * num + 4 * looks + 4 * X
    list_bytes = 4 * mosaic_gpu_rank.PART * X
    tile_bytes = mosaic_gpu_operands.round_up(R * nodes, 32) * (2 * K + 8)
    room = SHARED_BYTES - consumers * mosaic_gpu_rank.PART * row_bytes
    return max(0, min(MAX_STAGES, (room // rings - list_bytes) // tile_bytes))


def _program_tokens(is_grouped):
    """Queries of a thread block."""
    return mosaic_gpu_rank.count_consumers(is_grouped) * mosaic_gpu_rank.PART


def _list_tiles(low_BT, high_BT, tokens, nodes, G):
    """The tiles that a thread block's queries may see, if they look at all of them: first and number."""
    B = low_BT.shape[0]
    begin_BQ = low_BT.reshape(B, -1, tokens).min(-1) // nodes
    end_BQ = -(-high_BT.reshape(B, -1, tokens).max(-1) // nodes)
    steps_BGQ = jnp.repeat(jnp.maximum(end_BQ - begin_BQ, 0)[:, None], G, axis=1)
    return begin_BQ.astype(jnp.int32), steps_BGQ.astype(jnp.int32)


def _unite(group_BGTX, num):
    """Groups out of `num` that a consumer's queries look at, rising, and how many they are."""
    B, G, T, X = group_BGTX.shape
    part = mosaic_gpu_rank.PART
    # Sorting takes time by the byte.
    dtype = jnp.uint16 if num < jnp.iinfo(jnp.uint16).max else jnp.int32
    nowhere = jnp.iinfo(dtype).max
    id_BGQJ = group_BGTX.reshape(B, G, T // part, part * X)
    id_BGQJ = jnp.where(id_BGQJ < 0, nowhere, id_BGQJ).astype(dtype)
    id_BGQJ = jnp.sort(id_BGQJ, axis=-1)
    again = id_BGQJ[..., 1:] == id_BGQJ[..., :-1]
    again = jnp.pad(again, ((0, 0),) * 3 + ((1, 0),))
    id_BGQJ = jnp.sort(jnp.where(again, nowhere, id_BGQJ), axis=-1)
    count_BGQ = (id_BGQJ < nowhere).sum(-1, dtype=jnp.int32)
    return id_BGQJ.astype(jnp.int32), count_BGQ
