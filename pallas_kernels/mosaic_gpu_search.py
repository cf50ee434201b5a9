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
FLOAT8_BITS = 8
"""Numbers of a float8 query are below two to that; float8_e4m3fn reaches to 448."""
MAX_NODES = 2**20
"""A tile's number leaves 16 bits to a score: a sign, an exponent, and the 7 of bfloat16."""


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
        q_BTGK: float, one query a key/value head, times the scale; read as bfloat16, or as points are.
        point_BGMRK: float8_e4m3fn, or another float, read as bfloat16.
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
    tiles = mosaic_gpu_operands.round_up(M, group or nodes) // nodes
    plan = mosaic_gpu_rank.Plan(
        *(B, G, mosaic_gpu_operands.round_up(T, _program_tokens(X)), R, K),
        X=X,
        J=mosaic_gpu_rank.PART * X,
        num=num,
        nodes=nodes,
        parts=(group or nodes) // nodes,
        tile_bits=(tiles - 1).bit_length(),
        stages=_count_stages(R, K, nodes, num, X),
        point_pool=point_pool,
    )
    inputs = _prepare(
        *(plan, q_BTGK, point_BGMRK, log_count_BGMR, low_BT, high_BT),
        *(group_BGTX, widths),
    )
    id_BGAT = mosaic_gpu_rank.run(plan, inputs, interpret)
    return id_BGAT[..., :T].swapaxes(2, 3)


def fits(K, M, R, num, group=None, X=0):
    """Whether the kernel can find `num` of M nodes of R points of width K, all of them or of X groups of so many."""
    is_size = K in mosaic_gpu_operands.WIDTHS and M <= MAX_NODES and num <= MAX_RANKS
    return is_size and _choose_nodes(R, K, num, group, X) is not None


def _prepare(
    plan, q_BTGK, point_BGMRK, log_count_BGMR, low_BT, high_BT, group_BGTX, widths
):
    """The kernel's inputs: queries in whole thread blocks, points in tiles; arguments as for `find`."""
    B, G, M, R, _ = point_BGMRK.shape
    nodes, group = plan.nodes, plan.nodes * plan.parts
    pad, to_tokens = mosaic_gpu_operands.pad, {1: plan.T}
    low_BT, high_BT = (pad(x, to_tokens) for x in (low_BT, high_BT))
    low_BPT, high_BPT = (
        x.reshape(B, -1, mosaic_gpu_rank.PART) for x in (low_BT, high_BT)
    )
    inside = -(-low_BPT.max(-1) // nodes), high_BPT.min(-1) // nodes
    begin_BQ = list_BGQJ = group_BGXT = None
    if group_BGTX is None:
        begin_BQ, steps_BGQ = _list_tiles(low_BT, high_BT, plan.tokens, nodes, G)
    else:
        group_BGTX = pad(group_BGTX, {2: plan.T}, -1)
        list_BGQJ, count_BGQ = _unite(group_BGTX, -(-M // group))
        steps_BGQ = count_BGQ * plan.parts
        group_BGXT = group_BGTX.swapaxes(2, 3)

    def cut(x, value=0):
        x = pad(x, {2: mosaic_gpu_operands.round_up(M, group)}, value)
        x = x.reshape(B, G, -1, nodes, *x.shape[3:]).swapaxes(3, 4)
        return x.reshape(B, G, -1, R * nodes, *x.shape[5:])

    scale, zero = plan.of_logits
    dtype, scale_BGT = jnp.dtype(jnp.bfloat16), None
    if point_BGMRK.dtype == jnp.float8_e4m3fn:
        dtype = point_BGMRK.dtype
        q_BTGK, scale_BTG = to_float8(q_BTGK)
        scale_BGT = pad(scale_BTG, to_tokens).swapaxes(1, 2) * scale
    log_count = jnp.maximum(log_count_BGMR, mosaic_gpu_best.LOWEST) * scale + zero
    spread = square_BGT = None
    if widths is not None:
        square_BTG, spread_BGMR = widths
        spread = cut(spread_BGMR)
        square_BGT = pad(square_BTG, to_tokens).swapaxes(1, 2) * scale
    return mosaic_gpu_rank.Inputs(
        pad(q_BTGK.astype(dtype), to_tokens),
        cut(point_BGMRK.astype(dtype)),
        cut(log_count, mosaic_gpu_best.LOWEST),
        *(low_BT, high_BT, begin_BQ, steps_BGQ, group_BGXT, list_BGQJ),
        *inside,
        *(scale_BGT, spread, square_BGT),
    )


def to_float8(x):
    """Vectors [..., K] as float8_e4m3fn, and a float32 power of two for each, [...], whose products they are rounded to."""
    x = x.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.abs(x).max(-1))
    # Not so small that the scale is a subnormal number.
    scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -100) - FLOAT8_BITS)
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


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
    consumers = mosaic_gpu_rank.count_consumers(X)
    rings = consumers if X else 1
    looks = -(-num // mosaic_gpu_best.count_kept(nodes, num))
    # A query: its vector, bounds, scale, square, best nodes, doubts and groups. A tile: points, counts and spreads.
    row_bytes = 2 * K + 16 + 4 * num + 4 * looks + 4 * X
    list_bytes = 4 * mosaic_gpu_rank.PART * X
    tile_bytes = mosaic_gpu_operands.round_up(R * nodes, 32) * (2 * K + 8)
    room = SHARED_BYTES - consumers * mosaic_gpu_rank.PART * row_bytes
    return max(0, min(MAX_STAGES, (room // rings - list_bytes) // tile_bytes))


def _program_tokens(X):
    """Queries of a thread block."""
    return mosaic_gpu_rank.count_consumers(X) * mosaic_gpu_rank.PART


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
