"""The synthetic tasks by name, and batches of them. Every number of a task can be set: `TASKS["mqar"](num_pairs=64)`.

Batches are those of `pipeline`, with the weight on what is asked; it sums to 1 in every row, so that tasks which ask for
little are not drowned by those that ask everywhere.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from bsa.tasks import chains, counts, example, listops, needles, recall

TASKS: dict[str, Callable[..., example.Task]] = {
    "mqar": recall.Mqar,
    "joint_recall": recall.JointRecall,
    "selective_copy": recall.SelectiveCopy,
    "induction_hops": chains.InductionHops,
    "passkey": functools.partial(needles.Needles, "loop", value="short_number"),
    "niah_single_1": functools.partial(needles.Needles, "loop"),
    "niah_single_2": needles.Needles,
    "niah_single_3": functools.partial(needles.Needles, value="uuid"),
    "niah_multikey_1": functools.partial(needles.Needles, num_keys=4),
    "niah_multikey_2": functools.partial(needles.Needles, "needles"),
    "niah_multikey_3": functools.partial(needles.Needles, "needles", "uuid", "uuid"),
    "niah_multivalue": functools.partial(needles.Needles, num_values=4),
    "niah_multiquery": functools.partial(needles.Needles, num_keys=4, num_asked=4),
    "variable_tracking": chains.VariableTracking,
    "hop_needles": chains.HopNeedles,
    "common_words": counts.CommonWords,
    "frequent_words": counts.FrequentWords,
    "listops": listops.ListOps,
}

_TRAINING, _TESTING = 1, 2
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def train_batches(
    mix: Sequence[tuple[example.Task, int]],
    *,
    B: int,
    T: int,
    seed: int,
) -> grain.IterDataset:
    """Endless batches of packed examples; close the iterator, as with `pipeline.train_batches`.

    A row takes one of the mix's tasks, all equally often, and holds as many examples of its length as fit, each a
    segment of its own. The same arguments give the same batches bit for bit.

    Args:
        mix: tasks, each with the tokens of its examples.
        B: rows.
        T: tokens of a row.
    Raises:
        ValueError: T is no multiple of an example's length.
    """
    for _, num_tokens in mix:
        if T % num_tokens:
            raise ValueError(f"T={T} is no multiple of num_tokens={num_tokens}")

    def make_row(number):
        rng = np.random.default_rng((seed, number, _TRAINING))
        task, num_tokens = mix[rng.integers(len(mix))]
        drawn = [task.draw(num_tokens, rng) for _ in range(T // num_tokens)]
        return _row(drawn)

    def make_batch(number):
        return _stack([make_row(number * B + i) for i in range(B)])

    # Whole batches: handing over single rows takes grain four times as long as drawing them.
    batches = grain.MapDataset.range(sys.maxsize // B).map(make_batch)
    return batches.to_iter_dataset(_READ_AHEAD)


def test_batch(
    task: example.Task, num_tokens: int, sample_ids: Sequence[int], seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Test examples by number, one a row, never seen in training.

    Returns:
        The batch, T=num_tokens, and answer_id_BT for `example.score`.
    """
    drawn = [
        task.draw(num_tokens, np.random.default_rng((seed, int(number), _TESTING)))
        for number in sample_ids
    ]
    batch = _stack([_row([one]) for one in drawn])
    return batch, np.stack([one.answer_id_T for one in drawn])


def _stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _row(drawn):
    """Examples, one after another."""
    length = np.array([len(one.token_T) for one in drawn])
    starts = np.repeat(np.cumsum(length) - length, length)
    weight = np.concatenate([one.weight_T for one in drawn])
    return {
        "token_BT": np.concatenate([one.token_T for one in drawn]),
        "target_BT": np.concatenate([one.target_T for one in drawn]),
        "weight_BT": weight / weight.sum(),
        "segment_id_BT": np.repeat(
            np.arange(1, len(drawn) + 1, dtype=np.int32), length
        ),
        "position_BT": np.arange(len(starts), dtype=np.int32) - starts.astype(np.int32),
    }
