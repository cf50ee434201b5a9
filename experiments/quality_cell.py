"""One cell of a table of `experiments.quality`: a method trained with one seed, and tested on every task of its suite."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import time
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
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


def train(
    cell: Cell, run: settings.RunSettings, mesh: jax.sharding.Mesh, starts: pathlib.Path
):
    """The parameters after the last step.

    Args:
        starts: folder with states after `train.start_steps`: methods that begin alike share them.
    """
    begin = time.monotonic()
    step_of, state, done = step.make_train_steps(run, mesh), None, 0
    if run.train.start_steps:
        start = starts / f"{start_name(cell, run, mesh)}.npz"
        if start.exists():
            done = run.train.start_steps
            state = load_arrays(start, step.abstract_state(run, mesh))
            logging.info("%d steps from %s", done, start)
    state = state or step.initial_state(run, mesh)
    with contextlib.closing(iter(training_batches(cell, run, done))) as batches:
        for number in range(done + 1, run.train.steps + 1):
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
            if number == run.train.start_steps:
                starts.mkdir(parents=True, exist_ok=True)
                save_arrays(start, state)
    return state.params


def start_name(cell: Cell, run: settings.RunSettings, mesh: jax.sharding.Mesh) -> str:
    """A hash of what the first `train.start_steps` depend on: program, initial values and data.

    So two methods share a start if what makes them differ is compiled out of it, without a list of knobs to keep true.
    """
    ids = jax.ShapeDtypeStruct((run.data.B, run.data.T), jnp.int32)
    names = ("token_BT", "target_BT", "segment_id_BT", "position_BT")
    batch = dict.fromkeys(names, ids)
    batch["weight_BT"] = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    first = step.make_train_step(run, mesh, model=run.start_model)
    # Not what it is lowered to, in which kernels are numbered in the order they were met.
    program = first.trace(step.abstract_state(run, mesh), batch).jaxpr
    known = (run.data, cell.parts.lessons, cell.parts.train, run.train.start_steps)
    name = hashlib.sha256(repr((str(program), run.train.steps, known)).encode())
    for constant in program.consts:
        name.update(np.asarray(constant).tobytes())
    for leaf in jax.tree.leaves(jax.device_get(step.initial_state(run, mesh))):
        name.update(np.asarray(leaf).tobytes())
    return name.hexdigest()[:16]


def training_batches(cell: Cell, run: settings.RunSettings, first: int = 0):
    """Text or tasks, without the first batches."""
    if is_text(cell.parts.train[0]):
        corpus = sources.open_corpus(run.data)
        return all_but(first, pipeline.train_batches(corpus, run.data))
    return stages(cell, run, first)


def stages(cell: Cell, run: settings.RunSettings, first: int) -> Iterator:
    """Lessons and then the mix of the suite's tasks, without the first batches."""
    lessons = [
        (parts, int(share * run.train.steps)) for share, parts in cell.parts.lessons
    ]
    for parts, num in (*lessons, (cell.parts.train, run.train.steps)):
        if num > first:
            mix = [(make_task(part, run), part.num_tokens) for part in parts]
            size = {"B": run.data.B, "T": run.data.T}
            batches = catalogue.train_batches(
                mix, **size, seed=run.data.seed, first=first
            )
            yield from all_but(0, batches, num - first)
        first = max(first - num, 0)


def all_but(num: int, data_set, limit: int | None = None) -> Iterator:
    """A data set without its first `num` items, and without what comes after its first `limit`."""
    with contextlib.closing(iter(data_set)) as items:
        yield from itertools.islice(items, num, limit)


def save_arrays(path: pathlib.Path, tree) -> None:
    """One array a leaf, by its place in the tree; whole or not at all."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    with open(unfinished, "wb") as file:
        np.savez(file, **{jax.tree_util.keystr(at): leaf for at, leaf in leaves})
    unfinished.rename(path)


def load_arrays(path: pathlib.Path, abstract):
    """What `save_arrays` wrote, each part where it belongs.

    Args:
        abstract: the tree, of shapes with shardings.
    """
    with np.load(path) as arrays:
        return jax.tree_util.tree_map_with_path(
            lambda at, leaf: jax.device_put(
                arrays[jax.tree_util.keystr(at)], leaf.sharding
            ),
            abstract,
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
    scores, attended, refused = [], [], []
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
        refused.append(float(figures.get("refused_choices", 0)))
    return {
        "task": _named(part),
        "length": num_tokens,
        "attended_tokens": float(np.mean(attended)),
        "refused_choices": float(np.mean(refused)),
        "score": float(np.mean(scores)),
        "chance": task.chance(num_tokens),
    }


def test_text(run, mesh, params, part: quality_parts.Part) -> list[dict]:
    """Bits per byte of rows that long, whole and by position: `length` ends at the bucket's end there."""
    corpus = sources.open_corpus(run.data)
    result = evaluate.Evaluator(run, corpus, mesh).bits_per_byte(params, part.samples)
    row = {
        "attended_tokens": result["attended_tokens"],
        "refused_choices": result.get("refused_choices", 0.0),
        "chance": 8.0,
    }
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
