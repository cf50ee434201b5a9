"""The whole model's step on a TPU: compiled for one without one, and interpreted beside `xla`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.parallel import mesh as meshes
from bsa.train import settings, step
from configs import tiny
from pallas_kernels import dispatch, mosaic_tpu
from tests.bsa.train import test_step
from tests.pallas_kernels import tpu


def test_step_of_tiny_compiles_for_one_chip():
    config = tiny.get_config()
    config.model.implementation = "mosaic_tpu"
    run = settings.from_config(config)
    devices = tpu.mesh("v5e").devices.ravel()
    mesh = meshes.make_mesh(run.mesh, devices)
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    batch = {
        name: jax.ShapeDtypeStruct((run.data.B, run.data.T), dtype, sharding=sharding)
        for name, dtype in {
            "token_BT": jnp.int32,
            "target_BT": jnp.int32,
            "segment_id_BT": jnp.int32,
            "position_BT": jnp.int32,
            "weight_BT": jnp.float32,
        }.items()
    }
    with jax.set_mesh(mesh):
        state = step.abstract_state(run, mesh)
        lowered = step.make_train_step(run, mesh).lower(state, batch)
    compiled = lowered.compile(compiler_options=tpu.compiler_options())
    assert set(tpu.kernels(compiled)) == {"bsa_forward", "bsa_dq", "bsa_dkv"}
    assert compiled.memory_analysis().peak_memory_in_bytes < 16e9


def test_step_of_interpreted_kernels_is_that_of_xla(monkeypatch):
    # The plain interpreter: flax can't scan over layers with the other one's callbacks.
    interpreted = functools.partial(mosaic_tpu.attend, interpret=True)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_tpu", interpreted)
    runs = [test_step.tiny_run(implementation=x) for x in ("xla", "mosaic_tpu")]
    mesh = meshes.make_mesh(runs[0].mesh, jax.devices()[:1])
    batch = test_step.random_batch(runs[0])
    # Compiled without optimisation: that takes longer than the one step does.
    (expected, expected_figures), (state, figures) = (
        step.make_train_step(run, mesh)
        .lower(step.abstract_state(run, mesh), batch)
        .compile(compiler_options={"xla_backend_optimization_level": 0})(
            step.initial_state(runs[0], mesh), batch
        )
        for run in runs
    )
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(figures[name], expected_figures[name], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        state.params,
        expected.params,
    )
