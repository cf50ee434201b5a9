"""Meshes and shardings: the table is followed, and errors name both numbers.

Tests that take the fixture `devices` need eight devices. They are skipped in a normal
run, where `test_on_eight_devices` runs this file again with eight virtual ones.
"""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from bsa.parallel import mesh as mesh_lib
from bsa.train import checkpoint
from bsa.train import settings as settings_lib
from configs import base


@pytest.fixture
def devices():
    if jax.device_count() < 8:
        pytest.skip("run by test_on_eight_devices")
    return jax.devices()


def make_settings(**changes):
    return mesh_lib.MeshSettings(**base.get_config().mesh.to_dict() | changes)


def make_mesh(data, fsdp, devices, context=1, tensor=1):
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    return mesh_lib.make_mesh(make_settings(**sizes), devices)


def make_params():
    return {
        "embedding_VD": jnp.ones((256, 16)),
        "layers": {
            "query_DHK": jnp.ones((3, 16, 4, 8)),
            "down_FD": jnp.ones((3, 24, 16)),
            "odd_DF": jnp.ones((3, 10, 24)),
            "scale_D": jnp.ones((3, 16)),
        },
        "scale_D": jnp.ones(16),
    }


def specs(mesh, tree):
    return jax.tree.map(
        lambda sharding: sharding.spec, mesh_lib.state_sharding(mesh, tree)
    )


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


@pytest.mark.parametrize("sizes", [(0, 1), (1, -2), (-1, -1)])
def test_impossible_settings(sizes):
    with pytest.raises(ValueError, match=f"data={sizes[0]}, fsdp={sizes[1]}"):
        make_settings(data=sizes[0], fsdp=sizes[1])


def test_one_device():
    mesh = make_mesh(-1, 1, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_too_many_devices_asked_for():
    with pytest.raises(ValueError, match=r"is 12 devices, but there are 1;"):
        make_mesh(3, 4, jax.devices()[:1])


def test_an_array_that_is_not_what_its_name_says():
    mesh = make_mesh(1, 1, jax.devices()[:1])
    with pytest.raises(ValueError, match=r"query_DHK has shape \(16, 8\)"):
        mesh_lib.state_sharding(mesh, {"query_DHK": jnp.ones((16, 8))})


def test_a_single_machine_needs_no_cluster():
    """In a process of its own, since JAX must not have been used before."""
    code = (
        "from bsa.parallel import mesh; mesh.initialize_distributed(); "
        "import jax; assert jax.process_count() == 1"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.parametrize(
    "asked, made",
    [
        ((-1, 1, 1, 1), (8, 1, 1, 1)),
        ((2, -1, 2, 1), (2, 2, 2, 1)),
        ((1, 1, -1, 2), (1, 1, 4, 2)),
    ],
)
def test_minus_one_takes_all_that_are_left(devices, asked, made):
    mesh = make_mesh(*asked[:2], devices, *asked[2:])
    assert tuple(mesh.shape.values()) == made


def test_sizes_that_do_not_fit(devices):
    with pytest.raises(ValueError, match=r"data=3.* is 3 devices, but there are 8;"):
        make_mesh(3, 1, devices)
    with pytest.raises(ValueError, match=r"data=2.* is 6 devices, but there are 8;"):
        make_mesh(-1, 3, devices)


def test_the_table_is_followed(devices):
    mesh = make_mesh(1, 2, devices, 2, 2)
    model_width, heads = ("fsdp", "context"), ("tensor",)
    assert specs(mesh, make_params()) == {
        "embedding_VD": PartitionSpec(heads, model_width),
        "layers": {
            "query_DHK": PartitionSpec(None, model_width, heads, None),
            "down_FD": PartitionSpec(None, heads, model_width),
            "odd_DF": PartitionSpec(None, None, heads),  # 4 does not divide 10
            "scale_D": PartitionSpec(),
        },
        "scale_D": PartitionSpec(),
    }
    assert mesh_lib.activation_spec("BTHK") == PartitionSpec(
        ("data", "fsdp"), ("context",), heads, None
    )


def test_moments_live_where_their_parameters_live(devices):
    mesh = make_mesh(2, 4, devices)
    params = make_params()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.array(0),
    }
    shardings = mesh_lib.state_sharding(mesh, jax.eval_shape(lambda: state))
    adam = shardings["optimizer"][1][0]
    assert adam.mu == adam.nu == shardings["params"]
    assert adam.count.spec == shardings["step"].spec == PartitionSpec()
    placed = jax.device_put(state, shardings)
    query_DHK = placed["params"]["layers"]["query_DHK"]
    assert query_DHK.addressable_shards[0].data.shape == (3, 4, 4, 8)


def test_rows_and_their_tokens_are_split(devices):
    mesh = make_mesh(2, 1, devices, 4)
    rows = {"tokens_BT": np.arange(4 * 8).reshape(4, 8), "weight_BT": np.ones((4, 8))}
    batch = mesh_lib.global_batch(mesh, rows)
    for name, value in rows.items():
        sharding = mesh_lib.batch_sharding(mesh)
        assert batch[name].sharding.is_equivalent_to(sharding, value.ndim)
        np.testing.assert_array_equal(batch[name], value)
    assert batch["tokens_BT"].addressable_shards[0].data.shape == (2, 2)


def test_rows_that_do_not_divide(devices):
    with pytest.raises(ValueError, match=r"B=12 .* over 8 devices; B=16 would"):
        mesh_lib.global_batch(make_mesh(8, 1, devices), {"tokens_BT": np.ones((12, 3))})
    with pytest.raises(ValueError, match="T=3 tokens do not divide over context=8"):
        mesh_lib.global_batch(
            make_mesh(1, 1, devices, 8), {"tokens_BT": np.ones((2, 3))}
        )


def test_a_checkpoint_is_restored_onto_another_mesh(devices, tmp_path):
    settings = settings_lib.TrainSettings(**base.get_config().train.to_dict())
    settings = dataclasses.replace(settings, keep_checkpoints=1)
    params = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(0), x.shape), make_params()
    )
    before = make_mesh(2, 4, devices)
    placed = jax.device_put(params, mesh_lib.state_sharding(before, params))
    after = make_mesh(2, 2, devices[:4])
    wanted = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        mesh_lib.state_sharding(after, params),
    )
    with checkpoint.open_manager(tmp_path, settings) as manager:
        checkpoint.save(manager, 1, placed)
        manager.wait_until_finished()
        _, restored = checkpoint.restore_newest(manager, wanted)
    for left, right, want in zip(*map(jax.tree.leaves, (restored, params, wanted))):
        assert left.sharding == want.sharding
        np.testing.assert_array_equal(left, right)
