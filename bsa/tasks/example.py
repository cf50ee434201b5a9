"""A text that asks for something, and how answers to it are scored: what every synthetic task draws."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Tokens and what is asked of them.

    Attributes:
        token_T: int32 in [0, V), what the model reads.
        target_T: int32, what it should say at each token; 0 where nothing is asked.
        answer_id_T: int32, which answer that is a part of, counted from 1; 0 where nothing is asked. The tokens of one
            answer (the digits of a number) count together.
    """

    token_T: np.ndarray
    target_T: np.ndarray
    answer_id_T: np.ndarray

    @property
    def weight_T(self) -> np.ndarray:
        """float32, 1 where something is asked: nothing else of a random text can be learned."""
        return (self.answer_id_T > 0).astype(np.float32)

    def score(self, predicted_T) -> float:
        """Share of the answers whose tokens are all as they should be; what is said elsewhere is ignored."""
        hit_1T = (np.asarray(predicted_T) == self.target_T)[None]
        return float(score(hit_1T, self.answer_id_T[None])[0])


class Examples(NamedTuple):
    """Examples of one length, stacked; arrays as in `Example`."""

    token_BT: np.ndarray
    target_BT: np.ndarray
    answer_id_BT: np.ndarray


class Task(Protocol):
    """A kind of example. Frozen dataclasses implement it; their fields say how hard it is.

    Attributes:
        V: vocabulary.
    """

    V: int

    def draw(self, num_tokens: int, rng: np.random.Generator) -> Example:
        """An example of T=num_tokens. Raises ValueError where that has no room for it."""

    def chance(self, num_tokens: int) -> float:
        """Expected score of who knows the form of such texts and guesses among what the text offers."""


class BatchTask:
    """A task that draws many examples in NumPy's steps for all of them at once; one is drawn as many are."""

    def draw(self, num_tokens: int, rng: np.random.Generator) -> Example:
        return Example(*(x[0] for x in self.draw_many(num_tokens, rng, 1)))

    def draw_many(
        self, num_tokens: int, rng: np.random.Generator, num: int
    ) -> Examples:
        """`num` examples."""
        raise NotImplementedError


def draw_many(
    task: Task, num_tokens: int, rng: np.random.Generator, num: int
) -> Examples:
    """`num` examples of a task."""
    if isinstance(task, BatchTask):
        return task.draw_many(num_tokens, rng, num)
    return stack([task.draw(num_tokens, rng) for _ in range(num)])


def stack(drawn: Sequence[Example]) -> Examples:
    """Examples of one length as one."""
    arrays = ((one.token_T, one.target_T, one.answer_id_T) for one in drawn)
    return Examples(*(np.stack(x) for x in zip(*arrays)))


def score(hit_BT, answer_id_BT) -> np.ndarray:
    """Share of each row's answers whose tokens were all hit: float64[B].

    Args:
        hit_BT: bool, whether the target was predicted.
        answer_id_BT: as in `Example`; every row asks for something.
    """
    missed = np.zeros((len(hit_BT), answer_id_BT.max() + 1), bool)
    row, place = np.nonzero((answer_id_BT > 0) & ~np.asarray(hit_BT))
    missed[row, answer_id_BT[row, place]] = True
    return 1 - missed.sum(1) / answer_id_BT.max(1)


def from_text(text_S, answer_id_S) -> Example:
    """An example whose answers stand in the text itself and are read on once they are given (S = T + 1).

    Args:
        answer_id_S: which answer each token of the text belongs to, 0 for none.
    """
    return Example(*(x[0] for x in from_texts(text_S[None], answer_id_S)))


def from_texts(text_BS, answer_id_S) -> Examples:
    """The same of B texts whose answers stand at the same places."""
    answer_id_BT = np.broadcast_to(answer_id_S[1:], text_BS[:, 1:].shape)
    target_BT = np.where(answer_id_BT > 0, text_BS[:, 1:], 0)
    arrays = (text_BS[:, :-1], target_BT, answer_id_BT)
    return Examples(*(x.astype(np.int32) for x in arrays))


def from_targets(token_T, target_T, answer_id_T) -> Example:
    """An example as it stands, in int32."""
    return Example(*(x.astype(np.int32) for x in (token_T, target_T, answer_id_T)))


def draw_distinct(
    rng: np.random.Generator, population: int, shape: tuple[int, int]
) -> np.ndarray:
    """Rows of ids below `population`, no id twice in a row; all such rows are equally likely: int64[shape]."""
    id_BN = rng.integers(population, size=shape)
    while True:
        # Of equal ids in a row the first stays; others are drawn again.
        order_BN = np.argsort(id_BN, axis=1, kind="stable")
        sorted_BN = np.take_along_axis(id_BN, order_BN, axis=1)
        is_taken = np.zeros(shape, bool)
        is_same = sorted_BN[:, 1:] == sorted_BN[:, :-1]
        np.put_along_axis(is_taken, order_BN[:, 1:], is_same, axis=1)
        if not is_taken.any():
            return id_BN
        id_BN[is_taken] = rng.integers(population, size=is_taken.sum())


def check_room(name: str, num_tokens: int, needed: int) -> None:
    """Raises ValueError if a text of `num_tokens` has fewer than the `needed` ones."""
    if num_tokens < needed:
        raise ValueError(
            f"{name}: num_tokens={num_tokens} has no room; at least {needed} are needed"
        )
