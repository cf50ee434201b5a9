"""The tasks by name, and batches of them. Every number of a task can be set: `TASKS["mqar"](num_pairs=64)`.

Batches are those of `pipeline`, with the weight on what is asked; it sums to 1 in every row, so that tasks which ask for
little are not drowned by those that ask everywhere.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from bsa.tasks import chains, citations, counts, example, listops, needles, recall

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
    "setmm_recall": citations.Citations,
}

_TRAINING, _TESTING = 1, 2
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def train_batches(
    mix: Sequence[tuple[example.Task, int]],
    *,
    B: int,
    T: int,
    seed: int,
    first: int = 0,
) -> grain.IterDataset:
    """Endless batches of packed examples; close the iterator, as with `pipeline.train_batches`.

    A row takes one of the mix's tasks, all equally often, and holds as many examples of its length as fit, each a
    segment of its own. The same arguments give the same batches bit for bit.

    Args:
        mix: tasks, each with the tokens of its examples.
        B: rows.
        T: tokens of a row.
        first: batches that are left out.
    Raises:
        ValueError: T is no multiple of an example's length.
    """
    for _, num_tokens in mix:
        if T % num_tokens:
            raise ValueError(f"T={T} is no multiple of num_tokens={num_tokens}")

    def make_batch(number):
        rng = np.random.default_rng((seed, number, _TRAINING))
        part_B = rng.integers(len(mix), size=B)
        batch = {}
        for part, (task, num_tokens) in enumerate(mix):
            (row,) = np.nonzero(part_B == part)
            if not len(row):
                continue
            num = len(row) * T // num_tokens
            drawn = example.draw_many(task, num_tokens, rng, num)
            for name, value in _rows(drawn, T).items():
                batch.setdefault(name, np.zeros((B, T), value.dtype))[row] = value
        return batch

    # Whole batches: handing over single rows takes grain four times as long as drawing them.
    batches = grain.MapDataset.range(first, sys.maxsize // B).map(make_batch)
    return batches.to_iter_dataset(_READ_AHEAD)


def test_batch(
    task: example.Task, num_tokens: int, sample_ids: Sequence[int], seed: int, T: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Test examples by number, never seen in training, packed into rows of T tokens, a multiple of `num_tokens`.

    Returns:
        The batch, and the examples' answer_id_BT for `example.score`: a row each, whatever rows they are packed into.
    """
    drawn = example.stack(
        [
            task.draw(num_tokens, np.random.default_rng((seed, int(number), _TESTING)))
            for number in sample_ids
        ]
    )
    return _rows(drawn, T), drawn.answer_id_BT


def _rows(drawn, T):
    """Examples, one after another, in rows of T tokens."""
    num_tokens = drawn.token_BT.shape[1]
    weight_BT = (drawn.answer_id_BT > 0).astype(np.float32).reshape(-1, T)
    place_T = np.arange(T, dtype=np.int32)
    rows = len(weight_BT)
    return {
        "token_BT": drawn.token_BT.reshape(rows, T),
        "target_BT": drawn.target_BT.reshape(rows, T),
        "weight_BT": weight_BT / weight_BT.sum(1, keepdims=True),
        "segment_id_BT": np.tile(1 + place_T // num_tokens, (rows, 1)),
        "position_BT": np.tile(place_T % num_tokens, (rows, 1)),
    }
