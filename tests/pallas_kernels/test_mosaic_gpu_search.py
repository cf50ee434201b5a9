"""The search kernel finds what sorting all scores finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu, mosaic_gpu_search

B, T, G, K, M = 2, 200, 2, 64, 180
"""Two thread blocks a head, the second ragged; six tiles of 32 nodes, the last ragged."""
GROUP = 64
"""Two tiles of a group."""


def _draw(R):
    """Arguments of a search; equal nodes, and points and nodes that aren't there, among them.

    The heaviest are in one column of all tiles, more of them than are kept of a column.
    """
    rng = np.random.default_rng(R)
    # Sums of products of small integers are exact in float32 and in products of fewer bits.
    q_BTGK = rng.integers(-1, 2, (B, T, G, K)) / 4
    point_BGMRK = rng.integers(-1, 2, (B, G, M, R, K))
    count_BGMR = rng.integers(0, 3, (B, G, M, R))
    point_BGMRK[:, :, 20:40], count_BGMR[:, :, 20:40] = (
        x[:, :, 100:120] for x in (point_BGMRK, count_BGMR)
    )
    count_BGMR[:, :1, 7::32] *= 40
    with np.errstate(divide="ignore"):
        log_count_BGMR = np.log(count_BGMR)
    high_BT = np.sort(rng.integers(0, M + 1, (B, T)), axis=1)
    low_BT = np.maximum(0, high_BT - rng.integers(0, M, (B, T)))
    floats = [x.astype(np.float32) for x in (q_BTGK, point_BGMRK, log_count_BGMR)]
    return *floats, low_BT.astype(np.int32), high_BT.astype(np.int32)


@pytest.mark.parametrize(
    ("R", "num", "is_grouped", "has_spread", "point_pool", "dtype"),
    [
        (3, 5, False, False, "logsumexp", "float8_e4m3fn"),
        (9, 5, False, True, "logsumexp", "bfloat16"),
        (9, 5, True, False, "max", "float8_e4m3fn"),
        (1, 21, True, False, "logsumexp", "bfloat16"),
    ],
)
def test_finds_the_best(R, num, is_grouped, has_spread, point_pool, dtype):
    interpret = None
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        interpret = plgpu.InterpretGPUParams()
    arguments = _draw(R)
    groups = None
    if is_grouped:
        group_BGTX = np.random.default_rng(9).integers(-1, -(-M // GROUP), (B, G, T, 3))
        groups = jnp.asarray(group_BGTX, jnp.int32), GROUP

    square_BTG = (np.square(arguments[0]).sum(-1) / 2).astype(np.float32)
    spread_BGMR = np.zeros((B, G, M, R), np.float32)
    if has_spread:
        spread_BGMR += np.random.default_rng(8).integers(0, 3, spread_BGMR.shape)

    @jax.jit
    def find(*arrays):
        return mosaic_gpu_search.find(
            *(*arrays, num),
            groups=groups,
            widths=(square_BTG, spread_BGMR) if has_spread else None,
            point_pool=point_pool,
            interpret=interpret,
        )

    q, point, *others = map(jnp.asarray, arguments)
    found = find(q, point.astype(dtype), *others)
    q, point, log_count, low, high = arguments
    logit = np.einsum("btgk,bgmrk->bgtmr", q, point) + log_count[:, :, None]
    logit += np.einsum("btg,bgmr->bgtmr", square_BTG, spread_BGMR)
    with np.errstate(divide="ignore"):
        mass = np.exp(logit, dtype=np.float64)
        score = np.log(mass.max(-1) if point_pool == "max" else mass.sum(-1))
    place = np.arange(M)
    is_open = (place >= low[..., None]) & (place < high[..., None])
    is_open = is_open[:, None]
    if is_grouped:
        is_open = is_open & (group_BGTX[..., None] == place // GROUP).any(3)
    score = np.where(is_open, score, -np.inf)
    order = np.argsort(-np.round(score, 4), axis=-1, kind="stable")[..., :num]
    best = np.take_along_axis(score, order, -1)
    if R == 1:
        expected = np.where(best > -np.inf, order, -1)
        np.testing.assert_array_equal(found, expected)
    # Rounding decides between nodes whose points add up to almost the same.
    assert ((found < 0) == (best == -np.inf)).all()
    ours = np.take_along_axis(score, np.maximum(found, 0), -1)
    np.testing.assert_allclose(
        np.where(found < 0, 0, ours), np.where(found < 0, 0, best), atol=4e-4
    )
    ranks = np.sort(found, axis=-1)
    assert ((ranks[..., 1:] != ranks[..., :-1]) | (ranks[..., 1:] < 0)).all()


def test_tells_many_nodes_apart():
    """Half a million in groups of 64, of which all queries look at three: tiles' numbers take 14 bits of a rank."""
    num, group, looked = 2**19, 64, (5, 2**12, 2**13 - 1)
    interpret = None
    if not mosaic_gpu.is_hopper(jax.devices()[0]):
        interpret = plgpu.InterpretGPUParams()
    rng = np.random.default_rng(0)
    nodes = np.concatenate([np.arange(x * group, (x + 1) * group) for x in looked])
    q_TK = rng.integers(-1, 2, (64, K)) / 4
    point_MK = rng.integers(-1, 2, (len(nodes), K))
    point_MK[:8] = point_MK[-8:]  # equal ones, far apart
    point = jnp.zeros((1, 1, num, 1, K), jnp.bfloat16).at[0, 0, nodes, 0].set(point_MK)
    found = mosaic_gpu_search.find(
        jnp.asarray(q_TK, jnp.float32)[None, :, None],
        point,
        jnp.zeros((1, 1, num, 1)),
        jnp.zeros((1, 64), jnp.int32),
        jnp.full((1, 64), num - 1, jnp.int32),
        8,
        groups=(jnp.broadcast_to(jnp.array(looked, jnp.int32), (1, 1, 64, 3)), group),
        interpret=interpret,
    )
    score_TM = q_TK @ point_MK.T
    score_TM[:, nodes == num - 1] = -np.inf
    order = np.argsort(-score_TM, axis=1, kind="stable")[:, :8]
    np.testing.assert_array_equal(found[0, 0], nodes[order])
