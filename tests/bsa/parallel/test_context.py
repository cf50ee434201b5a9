"""A row over many devices gives what one device gives: attention of every kind and transport, with its gradients."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from bsa.index import local, settings, turn
from bsa.model import dense
from bsa.parallel import attend, exchange, select
from bsa.parallel import mesh as mesh_lib
from configs import base
from pallas_kernels import dispatch, selection

B, T, H, G, K = 4, 256, 4, 2, 8
BLOCK = 4
MESHES = ((1, 8), (2, 4), (4, 2))  # data x context
# Sums of up to 256 terms of size 1, in float32, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def devices():
    if jax.device_count() < 8:
        pytest.skip("run by test_on_eight_devices")
    return jax.devices()


@pytest.mark.skipif("BSA_EIGHT_DEVICES" in os.environ, reason="would call itself")
def test_on_eight_devices():
    env = os.environ | {
        "BSA_EIGHT_DEVICES": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " 1 skipped" in run.stdout, run.stdout + run.stderr


def make_placement(data, context, devices, **options):
    mesh = jax.make_mesh(
        (data, 1, context, 1),
        mesh_lib.MESH_AXES,
        axis_types=(AxisType.Auto,) * 4,
        devices=devices[: data * context],
    )
    return mesh_lib.Placement(mesh, **options)


def make_arrays():
    """q, k, v, segments of two documents that part inside a block and a shard, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K))
    q, k, v, d_out = (jax.random.normal(*pair) for pair in zip(keys, shapes))
    segment = jnp.broadcast_to((jnp.arange(T) > 150).astype(jnp.int32), (B, T))
    return q, k, v, segment, d_out


def make_lists():
    """Random lists of uneven length: every fifth is empty, the last device's are full, some name later blocks.

    The second eighth of the row is in none of them: with eight devices, nobody wants what the second one has.
    """
    rng = np.random.default_rng(0)
    num, J = T // BLOCK, 12
    wanted = np.delete(np.arange(num), np.arange(num // 8, num // 4))
    block_id = np.broadcast_to(wanted, (B, G, num, len(wanted)))
    block_id = rng.permuted(block_id, axis=-1)[..., :J]
    count = rng.integers(0, J + 1, (B, G, num)) * (np.arange(num) % 5 > 0)
    count[..., -num // 8 :] = J
    block_id = np.where(np.arange(J) < count[..., None], block_id, -1)
    mask = rng.integers(1, 2**BLOCK, block_id.shape)
    return selection.BlockSelection(
        jnp.array(block_id, jnp.int32),
        jnp.array(count, jnp.int32),
        jnp.array(mask, jnp.uint32),
        BLOCK,
        BLOCK,
    )


def value_and_gradients(function, arrays, d_out):
    """out, and the gradients of q, k, v against a cotangent."""

    def run(d_out, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(d_out)

    return jax.jit(run)(d_out, *arrays[:3])


def on_shards(function, data, context, devices, **options):
    """`function` with its placement, and a batch put there."""
    placement = make_placement(data, context, devices, **options)
    *arrays, d_out = (
        jax.device_put(
            x,
            jax.sharding.NamedSharding(
                placement.mesh, mesh_lib.activation_spec("BTHK"[: x.ndim])
            ),
        )
        for x in make_arrays()
    )
    return value_and_gradients(
        lambda q, k, v: function(q, k, v, arrays[3], placement), arrays, d_out
    )


def assert_close(actual, expected):
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


@pytest.mark.parametrize("data, context", MESHES)
def test_dense_ring_is_dense_attention(devices, data, context):
    def ring(q, k, v, segment, placement):
        return attend.dense(q, k, v, segment, placement, scale=0.3)

    q, k, v, segment, d_out = make_arrays()
    expected = value_and_gradients(
        lambda q, k, v: dense.attend(q, k, v, segment, 0.3), (q, k, v), d_out
    )
    assert_close(on_shards(ring, data, context, devices), expected)


@pytest.fixture(scope="module")
def expected_sparse():
    q, k, v, segment, d_out = make_arrays()

    def alone(q, k, v):
        ids = selection.SegmentIds(segment, segment)
        out, _ = dispatch.block_sparse_attention(
            q, k, v, make_lists(), scale=0.3, segment_ids=ids, implementation="xla"
        )
        return out

    return value_and_gradients(alone, (q, k, v), d_out)


CASES = [
    *((*mesh, "ring", 0) for mesh in MESHES),
    *((*mesh, "exchange", 3) for mesh in MESHES),
]


@pytest.mark.parametrize("data, context, transport, rounds", CASES)
def test_transports_are_the_kernel(
    devices, expected_sparse, data, context, transport, rounds
):
    """Also where an answer has room for a third of the blocks, or nobody wants a device's."""
    wanted = np.asarray(exchange.count_blocks(make_lists(), context))
    if context == 8:
        assert wanted[..., 1].max() == 0 < wanted[..., 0].max()
    capacity = -(-wanted.max() // rounds) if rounds else 0

    def sparse(q, k, v, segment, placement):
        options = {"scale": 0.3, "implementation": "xla"}
        return attend.block_sparse_attention(
            q, k, v, make_lists(), segment, placement, **options
        )

    actual = on_shards(
        sparse,
        data,
        context,
        devices,
        transport=transport,
        capacity_blocks=int(capacity),
    )
    assert_close(actual, expected_sparse)


def test_rounds_do_not_look_ahead(devices):
    """What later query blocks of a device ask for leaves the bits of earlier ones alone."""
    placement = make_placement(2, 4, devices, capacity_blocks=3)
    q, k, v, segment, _ = make_arrays()

    @jax.jit
    def run(lists):
        options = {"scale": 0.3, "implementation": "xla"}
        return attend.block_sparse_attention(
            q, k, v, lists, segment, placement, **options
        )

    lists, cut = make_lists(), 56
    later = jnp.roll(lists.block_id_BGQJ, 1, axis=0).at[:, :, :cut]
    changed = dataclasses.replace(
        lists,
        block_id_BGQJ=later.set(lists.block_id_BGQJ[:, :, :cut]),
        count_BGQ=lists.count_BGQ.at[:, :, cut:].set(12),
    )
    whole, other = run(lists), run(changed)
    np.testing.assert_array_equal(whole[:, : cut * BLOCK], other[:, : cut * BLOCK])
    assert (whole != other).any()


@pytest.mark.parametrize("longest, X", [(1, 0), (3, 0), (1, 4), (3, 4)])
def test_the_index_of_shards_is_the_index(devices, longest, X):
    """Spans and chapters of which some straddle shards, links, routes along both, exact keys, and choices open across a border."""
    changes = {"C": 4, "query_block": 4, "sink_tokens": 4, "J": 24, "A": 2}
    changes |= {"route": "graph", "P": 2, "frontier": 4, "beam": 2, "X": X}
    changes |= {"chapter_bookmarks": 4, "chapter_levels": 2, "route_tokens": 64}
    if longest > 1:
        changes |= {"span_blocks": longest, "spans": "learned", "digest": "spread"}
        changes |= {"chapter_by": "chain", "volume_chapters": 2, "store": "bfloat16"}
    index = settings.IndexSettings(**base.get_config().index.to_dict() | changes)
    q, k, _, _, _ = make_arrays()
    width = k.shape[-1]
    both = jax.random.normal(jax.random.key(0), (2, k.shape[2], width, width))
    boundary = turn.Boundary(*both) if longest > 1 else None
    position = jnp.where(jnp.arange(T) > 150, jnp.arange(T) - 151, jnp.arange(T))
    view = local.window(
        jnp.broadcast_to(position, (B, T)), window_tokens=12, sink_tokens=4, key_block=4
    )

    def choose(placement):
        return jax.jit(
            lambda q, k: select.choose(
                *(q, k, view, index, placement), scale=0.3, boundary=boundary
            )
        )

    alone = choose(mesh_lib.ALONE)(q, k)
    placement = make_placement(1, 8, devices)
    spec = jax.sharding.NamedSharding(placement.mesh, mesh_lib.activation_spec("BTHK"))
    shards = choose(placement)(*jax.device_put((q, k), spec))
    (*counts, learned), *lists = shards
    (*counts_alone, learned_alone), *lists_alone = alone
    exact = np.testing.assert_array_equal
    jax.tree.map(exact, (counts, lists), (counts_alone, lists_alone))
    if learned is not None:
        exact(learned.begin_BGM, learned_alone.begin_BGM)
        turns = learned.turn_BGM, learned_alone.turn_BGM
        np.testing.assert_allclose(*turns, atol=1e-6)
