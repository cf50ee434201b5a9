"""The training loop: data in, checkpoints and metrics out, resumable at any moment. Called by `bsa.main`."""

import contextlib
import pathlib
import signal
import time

import jax
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from bsa.parallel import mesh as meshes
from bsa.tasks import corpus as corpus_lib
from bsa.tasks import curriculum
from bsa.train import checkpoint, evaluate, settings, step, writer

PROFILE_FIRST_STEP = 10


def train(
    run: settings.RunSettings,
    corpus: corpus_lib.Corpus,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
):
    """Trains until `run.train.steps`, from the newest readable checkpoint in workdir if there is one.

    SIGTERM ends it after the current step, with a checkpoint.

    Returns:
        The final parameters, or None if it was told to stop before the last step.
    """
    batches = curriculum.Batches(corpus, run.data)
    manager = checkpoint.open_manager(workdir / "checkpoints", run.train)
    restored = checkpoint.restore_newest(
        manager, step.abstract_state(run, mesh), batches
    )
    first_step, state = restored or (0, step.initial_state(run, mesh))
    _log_start(run, mesh, state, first_step)
    evaluator = evaluate.Evaluator(run, corpus, mesh)
    step_of = step.make_train_steps(run, mesh)

    with (
        contextlib.closing(batches),
        writer.MetricsWriter(workdir, first_step) as metrics,
        _stop_on_sigterm() as should_stop,
        tqdm(
            total=run.train.steps, initial=first_step, unit="step", disable=None
        ) as progress,
    ):
        clock = _Clock(run)
        for number in range(first_step + 1, run.train.steps + 1):
            _profile(run, workdir, number - first_step)
            batch = meshes.global_batch(mesh, next(batches))
            clock.tokens += batch["token_BT"].size
            state, figures = step_of(number)(state, batch)
            progress.update()
            last = number == run.train.steps
            if number % run.train.log_every_steps == 0 or last:
                values = {
                    name: float(value)
                    for name, value in jax.device_get(figures).items()
                }
                values["tokens_per_s"] = clock.rate()
                metrics.write(number, values)
                progress.set_postfix_str(f"{values['bits_per_byte']:.3f} bits/byte")
                if progress.disable:
                    logging.info("%s", clock.line(number, values))
            held_out = {}
            if number % run.train.evaluate_every_steps == 0 or last:
                result = evaluator.bits_per_byte(
                    state.params, run.evaluation.quick_batches
                )
                held_out = {"bits_per_byte": result["bits_per_byte"]}
                metrics.write(
                    number, {"heldout_bits_per_byte": result["bits_per_byte"]}
                )
                clock.restart()
            stopping = should_stop(number)
            if number % run.train.checkpoint_every_steps == 0 or last or stopping:
                checkpoint.save(manager, number, state, batches, held_out)
                clock.restart()
            if stopping and not last:
                checkpoint.close(manager)
                logging.info(
                    "stopped at step %d of %d; run the same command to go on",
                    number,
                    run.train.steps,
                )
                return None
    checkpoint.close(manager)
    return state.params


def restore_params(
    run: settings.RunSettings, mesh: jax.sharding.Mesh, workdir: pathlib.Path
):
    """The parameters of the newest readable checkpoint, and its step.

    Raises:
        FileNotFoundError: there is none.
    """
    manager = checkpoint.open_manager(workdir / "checkpoints", run.train)
    restored = checkpoint.restore_newest(manager, step.abstract_state(run, mesh), None)
    checkpoint.close(manager)
    if restored is None:
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint; train first with the same --config and --workdir"
        )
    return restored[1].params, restored[0]


class _Clock:
    """Tokens a second since the last pause, and when the run will end."""

    def __init__(self, run):
        self._run = run
        self._since = None
        self.tokens = 0

    def restart(self):
        self._since = (self.tokens, time.monotonic())

    def rate(self):
        """Global tokens a second since the last call; 0 for the stretch that compiled."""
        then, self._since = self._since, (self.tokens, time.monotonic())
        if then is None or then[0] == self.tokens:
            return 0.0
        return (self.tokens - then[0]) / (self._since[1] - then[1])

    def line(self, number, values):
        steps, rate = self._run.train.steps, values["tokens_per_s"]
        left = (steps - number) * self._run.data.B * self._run.data.T
        eta = f"{left / rate:.0f} s left" if rate else "compiled"
        return (
            f"step {number}/{steps}  {values['bits_per_byte']:.3f} bits/byte  "
            f"gradient {values['gradient_norm']:.2f}  {rate:,.0f} tokens/s  {eta}"
        )


def _log_start(run, mesh, state, first_step):
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    logging.info("settings: %s", run)
    logging.info("mesh: %s of %s", dict(mesh.shape), mesh.devices.flat[0].device_kind)
    logging.info("%s parameters, starting at step %d", f"{num_params:,}", first_step)


@contextlib.contextmanager
def _stop_on_sigterm():
    """Yields a function that says, on all processes alike, whether somebody asked to stop."""
    asked = False

    def note(signum, frame):
        nonlocal asked
        asked = True

    def should_stop(number):
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(number)
        return asked

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield should_stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _profile(run, workdir, steps_done):
    """Starts and stops the trace."""
    if run.profile and steps_done == PROFILE_FIRST_STEP:
        jax.profiler.start_trace(str(workdir / "profile"))
    if run.profile and steps_done == PROFILE_FIRST_STEP + run.profile:
        jax.profiler.stop_trace()
