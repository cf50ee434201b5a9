"""A train state and the position in the data to checkpoints on disk, and back.

`bsa/train/loop.py` saves through here and resumes from here. A checkpoint is one
directory named by its step. Before Orbax gives it that name, a manifest of all its
files is put into it, so a checkpoint that was cut off, by a full disk or a broken
copy, is noticed before any of it is used.
"""

import hashlib
import json
import math

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from bsa.train import settings as settings_lib

MANIFEST = "bsa_manifest.json"
# Orbax writes these two after the manifest, in this order, and then names the directory.
STEP_METADATA = "_CHECKPOINT_METADATA"
COMMIT_MARK = "commit_success.txt"
# Where unreadable checkpoints are put, below the directory of the checkpoints.
SET_ASIDE = "unreadable"
# Where Orbax moves checkpoints that are not kept: a rename, which nothing can cut short.
DELETED = "deleted"
# Of larger files only the size is checked: every process would read them once more.
MAX_HASHED_BYTES = 2**26
METRIC = "bits_per_byte"


def open_manager(
    directory, settings: settings_lib.TrainSettings
) -> ocp.CheckpointManager:
    """Opens the checkpoints below `directory`, which is created if need be.

    The newest `keep_checkpoints` are kept, and the one with the fewest held-out bits
    per byte. Leftovers of interrupted saves are deleted; checkpoints that are not whole
    are moved to `directory/unreadable`, with a warning that names each.

    Raises:
        ValueError: there are checkpoints, and none is whole; nothing is changed then.
    """
    directory = epath.Path(directory).absolute()
    problems = _find_problems(directory)
    failures = {step: problem for step, problem in problems.items() if problem}
    if failures and len(failures) == len(problems):
        raise ValueError(_none_readable(directory, failures))
    _set_aside(directory, failures)
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(settings.keep_checkpoints),
                policies.BestN(get_metric_fn=_quality, n=1),
            ]
        ),
        best_fn=_quality,
        cleanup_tmp_directories=True,
        todelete_subdir=DELETED,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=lambda: _finish_save(directory)
        ),
    )
    return ocp.CheckpointManager(
        directory,
        options=options,
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            # Of one process: all read the same batches, and a run may go on with fewer of them.
            "data": ocp.JsonCheckpointHandler(),
        },
    )


def save(
    manager: ocp.CheckpointManager, step: int, state, iterator=None, metrics=None
) -> None:
    """Begins to save; files are written while training goes on.

    `state` and `iterator` may change as soon as this returns. A step that is saved
    already is left as it is. `close` waits for the files.

    Args:
        step: the number of updates that made `state`.
        iterator: a grain iterator, at the batch after `step`; None leaves it out.
        metrics: {"bits_per_byte": held-out bits}, or None where they were not measured.
    """
    if step in manager.all_steps():
        return
    items = {"state": ocp.args.StandardSave(state)}
    if iterator is not None:
        items["data"] = ocp.args.JsonSave(iterator.get_state())
    bits = (metrics or {}).get(METRIC, math.nan)
    manager.save(
        step,
        args=ocp.args.Composite(**items),
        metrics={METRIC: float(bits) if math.isfinite(bits) else None},
        force=True,
    )


def restore_newest(manager: ocp.CheckpointManager, abstract_state, iterator=None):
    """Reads the newest checkpoint that can be read.

    One that cannot is named in a warning, and moved away once an older one was read.

    Args:
        abstract_state: the state's `jax.ShapeDtypeStruct`s with the shardings wanted,
            whatever the shardings it was saved with.
        iterator: the grain iterator to put back to where it was; None leaves it out.
    Returns:
        (step, state), or None if there is no checkpoint.
    Raises:
        ValueError: no checkpoint can be read, or the newest belongs to another model.
    """
    failures = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = _restore(manager, step, abstract_state, iterator)
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, _OtherModelError) or jax.process_count() > 1:
                raise  # Processes that fail alone cannot agree on an older step.
            failures[step] = str(error).partition("\n")[0]
            continue
        if failures:
            _set_aside(manager.directory, failures)
            manager.reload()
        logging.info("Restored step %d from %s", step, manager.directory)
        return step, state
    if failures:
        raise ValueError(_none_readable(manager.directory, failures))
    return None


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for the files of the last save; raises what stopped it, if anything did."""
    manager.close()
    if jax.process_index() == 0:
        _remove(manager.directory / DELETED)


class _OtherModelError(ValueError):
    """A checkpoint is sound but holds other arrays than asked for."""


def _quality(metrics):
    """Larger is better; a checkpoint without a measurement is worst."""
    bits = metrics[METRIC]
    return -math.inf if bits is None else -bits


def _restore(manager, step, abstract_state, iterator):
    """One checkpoint's state; puts the iterator back as well."""
    _check_same_model(manager, step, abstract_state)
    items = {"state": ocp.args.StandardRestore(abstract_state)}
    if iterator is not None:
        items["data"] = ocp.args.JsonRestore()
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    if iterator is not None:
        iterator.set_state(restored.data)
    return restored.state


def _check_same_model(manager, step, abstract_state):
    """Orbax would cast types and describe a difference in pages."""
    saved = _shapes(manager.item_metadata(step)["state"])
    wanted = _shapes(abstract_state)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise _OtherModelError(
                f"{manager.directory / str(step)} belongs to another model: {name} is "
                f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} "
                "in this config; use the config it was trained with, or another workdir"
            )


def _shapes(tree):
    """Name to "dtype[shape]", for arrays and for Orbax's descriptions of them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }


def _finish_save(directory):
    """Lists the files of the save in progress. Orbax calls this, on one process."""
    _remove(directory / DELETED)
    for path in directory.iterdir():
        is_step = path.name[:1].isdigit()
        if is_step and not (path / COMMIT_MARK).exists():
            text = json.dumps(_describe_files(path), indent=1)
            (path / MANIFEST).write_text(text)


def _remove(folder):
    """Deletes a folder if it is there."""
    if folder.exists():
        folder.rmtree()


def _describe_files(path):
    """Each file below `path` to its size in bytes and, of small ones, its SHA-256."""
    files = {}
    for file in sorted(
        folder / name for folder, _, names in path.walk() for name in names
    ):
        name = str(file.relative_to(path))
        if name in (MANIFEST, STEP_METADATA, COMMIT_MARK):
            continue
        size = file.stat().length
        small = size <= MAX_HASHED_BYTES
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if small else None
        files[name] = {"bytes": size, "sha256": digest}
    return files


def _set_aside(directory, failures):
    """Moves checkpoints, by step and what is wrong with them, out of Orbax's sight."""
    multihost_utils.sync_global_devices("bsa: all processes have seen the checkpoints")
    for step, problem in failures.items():
        path, place = directory / str(step), directory / SET_ASIDE / str(step)
        logging.warning(
            "Checkpoint %s cannot be read (%s); moved to %s, others remain.",
            path,
            problem,
            place,
        )
        if jax.process_index() == 0:
            _remove(place)
            place.parent.mkdir(exist_ok=True)
            path.rename(place)
    multihost_utils.sync_global_devices("bsa: unreadable checkpoints are moved")


def _none_readable(directory, failures):
    """What to say when nothing can be resumed."""
    reasons = "; ".join(f"{step}: {problem}" for step, problem in failures.items())
    return (
        f"no checkpoint in {directory} can be read ({reasons}); "
        "put back a copy, or use another workdir to start afresh"
    )


def _find_problems(directory):
    """Every checkpoint's step to what is wrong with it, None if nothing is."""
    if not directory.exists():
        return {}
    steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
    return {step: _problem(directory / str(step)) for step in sorted(steps)}


def _problem(path):
    """Why the checkpoint is not whole, in a few words; None if it is."""
    try:
        if not (path / COMMIT_MARK).read_text():
            return f"{COMMIT_MARK} is empty"
        json.loads((path / STEP_METADATA).read_text())
        expected = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{error}".partition("\n")[0]
    found = _describe_files(path)
    for name, description in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != description["bytes"]:
            return f"{name} has {found[name]['bytes']} of {description['bytes']} bytes"
        if found[name] != description:
            return f"{name} was changed"
    return None
