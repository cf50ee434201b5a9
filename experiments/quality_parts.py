"""What a table of `experiments.quality` is made of."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples of one task and length, in training or as a test.

    Attributes:
        task: a name of `catalogue.TASKS`, or "text" for the text that `data.source` names.
        num_tokens: of an example.
        options: fields of the task.
        samples: test examples at least (rounded up to whole batches); of text, batches.
        knobs: that differ from the method's own in this test; none in training.
    """

    task: str
    num_tokens: int
    options: Mapping = dataclasses.field(default_factory=dict)
    samples: int = 0
    knobs: Mapping = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A table: every method is trained on `train` for every seed, and tested on `tests`.

    Attributes:
        base: knobs of all methods, by dotted name.
        methods: knobs that differ.
        train: mixed evenly by rows; one part "text" trains on text alone.
        lessons: what comes before `train`: shares of the steps, and what is mixed in these.
    """

    base: Mapping
    methods: Mapping[str, Mapping]
    train: Sequence[Part]
    tests: Sequence[Part]
    seeds: Sequence[int] = (0, 1, 2)
    lessons: Sequence[tuple[float, Sequence[Part]]] = ()
