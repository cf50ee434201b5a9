"""Checkpoints: exact, whole or refused, and kept by age and by quality."""

import dataclasses
import hashlib
import json
import os
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from bsa.train import checkpoint
from bsa.train import settings as settings_lib
from configs import base

SETTINGS = dataclasses.replace(
    settings_lib.TrainSettings(**base.get_config().train.to_dict()), keep_checkpoints=2
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict
    optimizer: optax.OptState
    step: jax.Array


def make_state(seed):
    """A small state with what a real one has: nested names, optimiser, counters."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "layers": {"query_DHK": jax.random.normal(keys[0], (2, 8, 2, 4))},
        "scale_D": jax.random.normal(keys[1], (8,)).astype(jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(params, optimizer.init(params), jnp.array(seed))


def make_iterator():
    return iter(
        grain.MapDataset.range(1000).seed(0).shuffle().batch(4).to_iter_dataset()
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(left, right):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)),
        left,
        right,
    )


def save_steps(directory, bits):
    """Saves {step: bits per byte}, one batch drawn before each save."""
    iterator = make_iterator()
    manager = checkpoint.open_manager(directory, SETTINGS)
    for step, value in bits.items():
        next(iterator)
        metrics = None if value is None else {"bits_per_byte": value}
        checkpoint.save(manager, step, make_state(step), iterator, metrics)
    checkpoint.close(manager)


def restore(directory):
    """(step, state, next batch) from a new manager, as a new process would."""
    iterator = make_iterator()
    with checkpoint.open_manager(directory, SETTINGS) as manager:
        restored = checkpoint.restore_newest(manager, abstract(make_state(0)), iterator)
    return None if restored is None else (*restored, next(iterator))


def batch_after(num_batches):
    iterator = make_iterator()
    return [next(iterator) for _ in range(num_batches + 1)][-1]


def newest_files(directory, step):
    return sorted(
        str(path.relative_to(directory / str(step)))
        for path in (directory / str(step)).rglob("*")
        if path.is_file()
    )


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    save_steps(directory, {10: 3.0, 20: 2.0})
    return directory


@pytest.fixture
def directory(two_checkpoints, tmp_path):
    return shutil.copytree(two_checkpoints, tmp_path / "checkpoints")


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: lines.append(text % args)
    )
    return lines


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_restores_state_and_data_exactly(directory, warnings):
    step, state, batch = restore(directory)
    assert step == 20
    assert_same(state, make_state(20))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(20))
    np.testing.assert_array_equal(batch, batch_after(2))
    assert not warnings


def test_state_may_be_donated_while_files_are_written(tmp_path):
    state = {"w_DF": jnp.arange(2.0**20).reshape(1024, 1024)}
    expected = np.array(state["w_DF"])
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * -1, s), donate_argnums=0)
    with checkpoint.open_manager(tmp_path, SETTINGS) as manager:
        checkpoint.save(manager, 1, state, make_iterator())
        described = abstract(state)
        for _ in range(3):
            state = jax.block_until_ready(overwrite(state))
        manager.wait_until_finished()
        _, restored = checkpoint.restore_newest(manager, described)
    np.testing.assert_array_equal(restored["w_DF"], expected)


def test_keeps_the_newest_and_the_best(tmp_path):
    save_steps(tmp_path, {1: 5.0, 2: 1.0, 3: None, 4: 3.0, 5: float("nan"), 6: 2.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    manager = checkpoint.open_manager(tmp_path, SETTINGS)
    assert manager.best_step() == 2
    checkpoint.save(manager, 7, make_state(7), make_iterator(), {"bits_per_byte": 4})
    checkpoint.close(manager)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6", "7"]


def test_saving_a_step_again_changes_nothing(directory):
    with checkpoint.open_manager(directory, SETTINGS) as manager:
        checkpoint.save(manager, 20, make_state(99), make_iterator())
    _, state, _ = restore(directory)
    assert_same(state, make_state(20))


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damage_to_any_file_of_the_newest_is_noticed(
    two_checkpoints, tmp_path, warnings, damage
):
    for number, name in enumerate(newest_files(two_checkpoints, 20)):
        if name == checkpoint.COMMIT_MARK and damage == "garbage":
            continue  # Its presence is all it says.
        directory = shutil.copytree(two_checkpoints, tmp_path / str(number))
        file = directory / "20" / name
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            keep = 0 if name == checkpoint.COMMIT_MARK else file.stat().st_size // 2
            os.truncate(file, keep)
        else:
            file.write_bytes(b"?" * file.stat().st_size)
        warnings.clear()
        step, state, batch = restore(directory)
        assert step == 10, name
        assert_same(state, make_state(10))
        np.testing.assert_array_equal(batch, batch_after(1))
        assert len(warnings) == 1 and str(directory / "20") in warnings[0], warnings
        assert (directory / checkpoint.SET_ASIDE / "20").is_dir()


def test_a_damaged_step_can_be_saved_again(directory):
    os.truncate(directory / "20" / "state" / "manifest.ocdbt", 10)
    assert restore(directory)[0] == 10
    save_steps(directory, {20: 2.0})
    step, state, _ = restore(directory)
    assert step == 20
    assert_same(state, make_state(20))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_that_the_manifest_cannot_see(directory, warnings):
    """Large files are not hashed: here the reader itself must stumble."""
    step = directory / "20"
    file = step / "state" / "manifest.ocdbt"
    file.write_bytes(b"?" * file.stat().st_size)
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    manifest["state/manifest.ocdbt"]["sha256"] = hashlib.sha256(
        file.read_bytes()
    ).hexdigest()
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    restored, state, batch = restore(directory)
    assert restored == 10
    assert_same(state, make_state(10))
    np.testing.assert_array_equal(batch, batch_after(1))
    assert any(str(step) in line for line in warnings)


def test_nothing_readable_is_an_error_and_changes_nothing(directory):
    for step in ("10", "20"):
        os.truncate(directory / step / "data" / "metadata", 3)
    before = newest_files(directory, 10), newest_files(directory, 20)
    with pytest.raises(ValueError, match=r"no checkpoint in .*10: data/.*; 20: data/"):
        restore(directory)
    assert before == (newest_files(directory, 10), newest_files(directory, 20))


def test_another_model_is_an_error_and_changes_nothing(directory):
    state = make_state(0)
    state.params["scale_D"] = jnp.zeros(16)
    with (
        checkpoint.open_manager(directory, SETTINGS) as manager,
        pytest.raises(ValueError, match=r"scale_D is bfloat16\[8\] there"),
    ):
        checkpoint.restore_newest(manager, abstract(state))
    assert restore(directory)[0] == 20


def test_a_save_that_was_killed_is_ignored_and_removed(directory, warnings):
    leftover = directory / "30.orbax-checkpoint-tmp-7"
    shutil.copytree(directory / "20", leftover)
    (leftover / checkpoint.COMMIT_MARK).unlink()
    (leftover / checkpoint.MANIFEST).unlink()
    assert restore(directory)[0] == 20
    assert not leftover.exists()
    save_steps(directory, {30: 1.0})
    assert restore(directory)[0] == 30
