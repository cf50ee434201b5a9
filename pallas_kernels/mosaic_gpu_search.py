"""The nodes of an index that each query likes best, on Hopper GPUs: scores stay on the chip. Called by `bsa.index.kernel`.

A node is a mixture of R points with counts, and its score the logarithm of the attention mass that they promise. Queries
that look at some groups of nodes only share the tiles of all groups that one of their thread block's queries looks at.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu, mosaic_gpu_operands, mosaic_gpu_rank, shapes

TOKENS = mosaic_gpu_rank.TOKENS
NODES = (64, 32, 16)
"""Of a tile, or of a group, which then is one: their scores, and what joins points, fill a consumer's registers."""
MAX_STAGES = 4
SHARED_BYTES = 184 * 2**10
"""For tiles and queries: lists and results take the rest."""
MAX_RANKS = 16
"""Most nodes that are found for a query."""
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
    interpret=None,
):
    """The `num` nodes in [low, high) with the highest scores for each query.

    Args:
        q_BTGK: float, one query a key/value head, times the scale; read as bfloat16.
        point_BGMRK: float, read as bfloat16.
        log_count_BGMR: float32, natural log; -inf for a point that isn't there.
        groups: None: a query looks at all these nodes. Else group_BGTX, int32, and how many consecutive nodes are a
            group: it looks at those of its groups only; -1 is none.
        interpret: as in `mosaic_gpu.attend`.
    Returns:
        id_BGTA: int32, best first, equal ones by id; -1 after the last that scores more than -inf.
    Raises:
        NotImplementedError: not a Hopper GPU, or sizes that the kernel lacks.
    """
    if interpret is None:
        mosaic_gpu.check_device(jax.devices()[0])
    group_BGTX, nodes = groups or (None, None)
    sizes = shapes.check(
        q_BTGK=q_BTGK,
        point_BGMRK=point_BGMRK,
        log_count_BGMR=log_count_BGMR,
        low_BT=low_BT,
        high_BT=high_BT,
        group_BGTX=group_BGTX,
    )
    B, T, G, K, M, R = (sizes[letter] for letter in "BTGKMR")
    nodes = nodes or _choose_nodes(R, K)
    if not fits(K, M, R, nodes) or num > MAX_RANKS:
        raise NotImplementedError(
            f"mosaic_gpu finds no {num} of M={M} nodes of R={R} points of width K={K} in groups of {nodes}: "
            f"{mosaic_gpu_operands.INSTEAD}"
        )
    tokens = mosaic_gpu_operands.round_up(T, TOKENS)
    padding = {3: mosaic_gpu_operands.round_up(M, nodes)}
    pad = mosaic_gpu_operands.pad
    low_BT, high_BT = (pad(x, {1: tokens}) for x in (low_BT, high_BT))
    begin_BQ, steps_BGQ, tile_BGQJ = _list_tiles(low_BT, high_BT, nodes, G)
    if group_BGTX is not None:
        group_BGTX = pad(group_BGTX, {2: tokens}, -1)
        tile_BGQJ, steps_BGQ = _unite(group_BGTX)
        group_BGTX = group_BGTX.swapaxes(2, 3)
    inputs = mosaic_gpu_rank.Inputs(
        pad(q_BTGK.astype(jnp.bfloat16), {1: tokens}),
        pad(point_BGMRK.astype(jnp.bfloat16).swapaxes(2, 3), padding),
        pad(
            jnp.maximum(log_count_BGMR, mosaic_gpu_rank.LOWEST).swapaxes(2, 3),
            padding,
            mosaic_gpu_rank.LOWEST,
        ),
        low_BT,
        high_BT,
        begin_BQ,
        steps_BGQ,
        group_BGTX,
        tile_BGQJ,
    )
    plan = mosaic_gpu_rank.Plan(
        *(B, G, tokens, R, K),
        X=0 if group_BGTX is None else group_BGTX.shape[2],
        J=0 if tile_BGQJ is None else tile_BGQJ.shape[3],
        num=num,
        nodes=nodes,
        stages=_count_stages(R, K, nodes),
    )
    id_BGAT, score_BGAT = mosaic_gpu_rank.run(plan, inputs, interpret)
    id_BGAT = jnp.where(score_BGAT > -jnp.inf, id_BGAT, -1).astype(jnp.int32)
    return id_BGAT[..., :T].swapaxes(2, 3)


def fits(K, M, R, nodes=None):
    """Whether the kernel can search M nodes of R points of width K, in groups of so many or (None) all of them."""
    nodes = nodes or _choose_nodes(R, K)
    fits_tile = K in mosaic_gpu_operands.WIDTHS and nodes in NODES
    return fits_tile and M <= MAX_NODES and _count_stages(R, K, nodes) > 0


def _choose_nodes(R, K):
    """Nodes of the largest tile of which there is room for two, so that one is copied while the other is read."""
    return next((x for x in NODES if _count_stages(R, K, x) > 1), NODES[-1])


def _count_stages(R, K, nodes):
    room = SHARED_BYTES - 2 * TOKENS * K
    return min(MAX_STAGES, room // (2 * R * nodes * K))


def _list_tiles(low_BT, high_BT, nodes, G):
    """The tiles that a thread block's queries may see, if they look at all of them: first and number."""
    B = low_BT.shape[0]
    begin_BQ = low_BT.reshape(B, -1, TOKENS).min(-1) // nodes
    end_BQ = -(-high_BT.reshape(B, -1, TOKENS).max(-1) // nodes)
    steps_BGQ = jnp.repeat(jnp.maximum(end_BQ - begin_BQ, 0)[:, None], G, axis=1)
    return begin_BQ.astype(jnp.int32), steps_BGQ.astype(jnp.int32), None


def _unite(group_BGTX):
    """Groups that a thread block's queries look at, rising, and how many they are."""
    B, G, T, X = group_BGTX.shape
    nowhere = jnp.iinfo(jnp.int32).max
    id_BGQJ = group_BGTX.reshape(B, G, T // TOKENS, TOKENS * X)
    id_BGQJ = jnp.sort(jnp.where(id_BGQJ < 0, nowhere, id_BGQJ), axis=-1)
    again = id_BGQJ[..., 1:] == id_BGQJ[..., :-1]
    again = jnp.pad(again, ((0, 0),) * 3 + ((1, 0),))
    id_BGQJ = jnp.sort(jnp.where(again, nowhere, id_BGQJ), axis=-1)
    return id_BGQJ, (id_BGQJ < nowhere).sum(-1, dtype=jnp.int32)
