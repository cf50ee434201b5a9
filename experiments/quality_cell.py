"""One cell of a table of `experiments.quality`: a method trained with one seed, and tested on every task of its suite."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
import types
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging

from bsa.parallel import mesh as meshes
from bsa.tasks import catalogue, example, pipeline, sources
from bsa.train import evaluate, settings, step
from configs import base
from experiments import quality_parts, quality_suites

TEST_SEED = 0
"""All methods and seeds are tested on the same examples."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method and seed of a suite.

    Attributes:
        steps: of training, warm-up and start with them in proportion; None: as many as the suite says.
    """

    suite: str
    method: str
    seed: int
    steps: int | None = None

    @property
    def table(self) -> str:
        """The name that its results go by."""
        return self.suite if self.steps is None else f"{self.suite}_{self.steps}"

    @property
    def parts(self) -> quality_parts.Suite:
        return quality_suites.SUITES[self.suite]

    def run(
        self, source: str | None, T: int | None = None, knobs=types.MappingProxyType({})
    ) -> settings.RunSettings:
        """Settings of its training, or for rows of T tokens and with other knobs; source=None is the suite's own."""
        config = base.get_config()
        config.update_from_flattened_dict(
            {**self.parts.base, **self.parts.methods[self.method], **knobs}
        )
        config.seed = config.data.seed = self.seed
        config.data.source = source or config.data.source
        config.data.T = T or config.data.T
        # No list is longer than the row: what would stay empty costs time.
        config.index.J = min(config.index.J, config.data.T // config.index.C)
        if self.steps:
            for name in ("warmup_steps", "start_steps", "steps"):
                value = config.train[name] * self.steps // config.train.steps
                config.train[name] = value
        return settings.from_config(config)

    def path(self, workdir: pathlib.Path) -> pathlib.Path:
        """Where it is kept."""
        return workdir / self.table / f"{self.method}-{self.seed}.json"

    def described(self, source: str | None) -> str:
        """All that its numbers depend on."""
        parts = self.parts
        return repr((self.run(source), parts.lessons, parts.train, parts.tests))


def train(cell: Cell, run: settings.RunSettings, mesh: jax.sharding.Mesh):
    """The parameters after the last step."""
    begin = time.monotonic()
    step_of, state = step.make_train_steps(run, mesh), step.initial_state(run, mesh)
    with contextlib.closing(iter(training_batches(cell, run))) as batches:
        for number in range(1, run.train.steps + 1):
            batch = meshes.global_batch(mesh, next(batches))
            state, figures = step_of(number)(state, batch)
            if number % 100 == 0 or number == run.train.steps:
                loss = float(figures["loss"])
                if not math.isfinite(loss):
                    raise FloatingPointError(f"{cell}: loss {loss} at step {number}")
                logging.info(
                    "step %d/%d  loss %.3f  %.0f s",
                    *(number, run.train.steps, loss, time.monotonic() - begin),
                )
    return state.params


def training_batches(cell: Cell, run: settings.RunSettings):
    """Text, or the mix of the suite's tasks, lessons first."""
    if is_text(cell.parts.train[0]):
        return pipeline.train_batches(sources.open_corpus(run.data), run.data)
    if not cell.parts.lessons:
        return task_batches(cell.parts.train, run)
    lessons, num = task_batches(cell.parts.lessons, run), run.train.steps // 10
    return first_of(lessons, num, task_batches(cell.parts.train, run))


def task_batches(parts, run: settings.RunSettings):
    """A mix of tasks."""
    mix = [(make_task(part, run), part.num_tokens) for part in parts]
    return catalogue.train_batches(mix, B=run.data.B, T=run.data.T, seed=run.data.seed)


def first_of(one, num: int, other) -> Iterator:
    """The first `num` items of one data set, then those of the other."""
    for data_set, limit in ((one, num), (other, None)):
        with contextlib.closing(iter(data_set)) as items:
            yield from itertools.islice(items, limit)


def save_params(path: pathlib.Path, params) -> None:
    """One array a parameter, by its place in the tree; whole or not at all."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    unfinished = path.with_suffix(".part")
    with open(unfinished, "wb") as file:
        np.savez(file, **{jax.tree_util.keystr(at): leaf for at, leaf in leaves})
    unfinished.rename(path)


def load_params(path: pathlib.Path, run: settings.RunSettings, mesh):
    """What `save_params` wrote, each part where it belongs."""
    with np.load(path) as arrays:
        return jax.tree_util.tree_map_with_path(
            lambda at, leaf: jax.device_put(
                arrays[jax.tree_util.keystr(at)], leaf.sharding
            ),
            step.abstract_state(run, mesh).params,
        )


def test(cell: Cell, run, mesh, params, tests) -> Iterator[list[dict]]:
    """The records of each of the tests, one after another."""
    known = {
        "suite": cell.table,
        "method": cell.method,
        "seed": cell.seed,
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "train_tokens": run.train.steps * run.data.B * run.data.T,
    }
    answer_steps = functools.cache(lambda run: step.make_answer_step(run, mesh))
    for part in tests:
        num_tokens = row_tokens(cell, run, part)
        longer = cell.run(run.data.source, num_tokens, part.knobs)
        if is_text(part):
            rows = test_text(longer, mesh, params, part)
        else:
            num = max(1, run.data.B * run.data.T // part.num_tokens)
            answer = functools.partial(answer_steps(longer), params)
            rows = [test_task(longer, mesh, part, num, answer)]
        yield [known | row for row in rows]


def row_tokens(cell: Cell, run: settings.RunSettings, part: quality_parts.Part) -> int:
    """Tokens of the rows that a test's examples are packed into: of as few lengths as can be, each is compiled for."""
    if is_text(part):
        return part.num_tokens
    longest = max(test.num_tokens for test in cell.parts.tests)
    return max(part.num_tokens, min(longest, run.data.B * run.data.T))


def test_task(run, mesh, part: quality_parts.Part, num: int, answer) -> dict:
    """Score over whole batches of `num` examples, at least `part.samples` of them."""
    task, num_tokens = make_task(part, run), part.num_tokens
    scores, attended = [], []
    for first in range(0, part.samples, num):
        batch, answer_id_BT = catalogue.test_batch(
            *(task, num_tokens, range(first, first + num), TEST_SEED), run.data.T
        )
        answers = answer(meshes.global_batch(mesh, batch))
        hit_BT, figures = jax.device_get(answers)
        scores += example.score(
            hit_BT.reshape(answer_id_BT.shape), answer_id_BT
        ).tolist()
        attended.append(float(figures["attended_tokens"]))
    return {
        "task": _named(part),
        "length": num_tokens,
        "attended_tokens": float(np.mean(attended)),
        "score": float(np.mean(scores)),
        "chance": task.chance(num_tokens),
    }


def test_text(run, mesh, params, part: quality_parts.Part) -> list[dict]:
    """Bits per byte of rows that long, whole and by position: `length` ends at the bucket's end there."""
    corpus = sources.open_corpus(run.data)
    result = evaluate.Evaluator(run, corpus, mesh).bits_per_byte(params, part.samples)
    row = {"attended_tokens": result["attended_tokens"], "chance": 8.0}
    whole = {
        "task": "bits_per_byte",
        "length": part.num_tokens,
        "score": result["bits_per_byte"],
    }
    buckets = [
        {
            "task": f"bits_of_{part.num_tokens}",
            "length": bucket["last"] + 1,
            "score": bucket["bits_per_byte"],
        }
        for bucket in result["bits_per_byte_by_position"]
    ]
    return [row | one for one in (whole, *buckets)]


def make_task(part: quality_parts.Part, run: settings.RunSettings) -> example.Task:
    """The task of a part, which must fit the model's vocabulary.

    Raises:
        ValueError: it does not.
    """
    task = catalogue.TASKS[part.task](**part.options)
    if task.V > run.model.V:
        raise ValueError(f"{part.task}: V={task.V} is above the model's {run.model.V}")
    return task


def is_text(part: quality_parts.Part) -> bool:
    return part.task == "text"


def _named(part):
    """Task, options and knobs, as in `mqar num_pairs=64`."""
    said = {**part.options, **part.knobs}
    return " ".join(
        [part.task, *(f"{k.rpartition('.')[2]}={v}" for k, v in said.items())]
    )
