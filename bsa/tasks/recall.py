"""Recall in its barest form: pairs, pairs by context, and a copy out of noise."""

import dataclasses

import numpy as np

from bsa.tasks import example


@dataclasses.dataclass(frozen=True)
class Mqar(example.BatchTask):
    """Multi-query associative recall, by the recipe of Zoology (Arora et al., arXiv 2312.04927).

    The text begins with `num_pairs` of a key and its value, k v k v ... Then each key comes once more, and its value is
    asked for at that very token; it is not told afterwards. Gaps before it follow a power law, and random tokens of
    the whole vocabulary stand in between. Keys are ids in [1, V/2), values in [V/2, V); no key and no value repeats
    among the pairs.

    With more `hops`, pairs form chains, told in any order: a value that is an id in [1, V/2) is another pair's key. The
    first key of each chain is asked, for the last value only: nothing on the way is told.

    Attributes:
        hops: pairs of a chain; divides `num_pairs`.
        power: the a of p(gap) ~ gap^(a - 1).
    """

    num_pairs: int = 4
    hops: int = 1
    power: float = 0.01
    V: int = 8192

    def draw_many(
        self, num_tokens: int, rng: np.random.Generator, num: int
    ) -> example.Examples:
        pairs, chains, half = self.num_pairs, self.num_pairs // self.hops, self.V // 2
        if pairs % self.hops:
            raise ValueError(
                f"mqar: num_pairs={pairs}, hops={self.hops}: no whole chains"
            )
        example.check_room("mqar", num_tokens, 4 * pairs)
        key = 1 + example.draw_distinct(rng, half - 1, (num, pairs))
        end = half + example.draw_distinct(rng, self.V - half, (num, chains))
        # A chain's keys lie `chains` apart; each is followed by the next, the last by the end.
        value = np.concatenate([key[:, chains:], end], axis=1)
        order = np.argsort(rng.random((num, pairs)), axis=1)
        token_BT = rng.integers(self.V, size=(num, num_tokens))
        for first, told in enumerate((key, value)):
            told = np.take_along_axis(told, order, axis=1)
            token_BT[:, first : 2 * pairs : 2] = told

        # An exponential race draws without replacement, by weight.
        gap = np.arange(1, num_tokens // 2 - pairs + 1)
        wait = rng.exponential(size=(num, len(gap))) / gap ** (self.power - 1)
        place = 2 * (pairs + np.argsort(wait, axis=1)[:, :chains])
        np.put_along_axis(token_BT, place, key[:, :chains], axis=1)
        target_BT, answer_id_BT = np.zeros((2, num, num_tokens), np.int32)
        np.put_along_axis(target_BT, place, end, axis=1)
        np.put_along_axis(answer_id_BT, place, 1 + np.arange(chains)[None], axis=1)
        return example.Examples(token_BT.astype(np.int32), target_BT, answer_id_BT)

    def chance(self, num_tokens: int) -> float:
        """One of the values that end a chain."""
        return self.hops / self.num_pairs


@dataclasses.dataclass(frozen=True)
class JointRecall:
    """Recall by context and key together, after arXiv 2507.00449.

    Each context is followed by the same keys, in an order of its own, with values of its own: c k v k v ... Then come
    questions of a context and a key; the value is asked for at the key. Ids: 0 fills the space between, a third each of
    [1, V) are contexts, keys and values.
    """

    num_contexts: int = 4
    num_keys: int = 4
    num_queries: int = 8
    V: int = 193

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        contexts, keys, queries = self.num_contexts, self.num_keys, self.num_queries
        told = contexts * (1 + 2 * keys)
        example.check_room("joint_recall", num_tokens, told + 2 * queries)
        third = (self.V - 1) // 3
        context = 1 + rng.choice(third, contexts, replace=False)
        key = 1 + third + rng.choice(third, keys, replace=False)
        # A row a context, a column a key: no two contexts give a key the same value.
        value = 1 + 2 * third
        value += np.stack(
            [rng.choice(third, contexts, replace=False) for _ in range(keys)], axis=1
        )
        token_T, target_T, answer_id_T = np.zeros((3, num_tokens), np.int32)
        parts = []
        for i in range(contexts):
            order = rng.permutation(keys)
            pairs = np.stack([key[order], value[i, order]], axis=1)
            parts += [context[i : i + 1], pairs.ravel()]
        token_T[:told] = np.concatenate(parts)

        asked = rng.choice(contexts * keys, queries, replace=False)
        place = num_tokens - 2 * queries + 2 * np.arange(queries)
        token_T[place], token_T[place + 1] = context[asked // keys], key[asked % keys]
        target_T[place + 1] = value[asked // keys, asked % keys]
        answer_id_T[place + 1] = 1 + np.arange(queries)
        return example.from_targets(token_T, target_T, answer_id_T)

    def chance(self, num_tokens: int) -> float:
        """One of the values that the key has in some context."""
        return 1 / self.num_contexts


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
    """Data tokens strewn over noise, to be repeated in order (Gu and Dao, arXiv 2312.00752).

    The text ends with as many marks as there are data tokens; at the i-th mark the i-th data token is asked for. Ids: 0
    is noise, 1 the mark, others data.
    """

    num_data: int = 16
    V: int = 16

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        num = self.num_data
        example.check_room("selective_copy", num_tokens, 2 * num)
        token_T, target_T, answer_id_T = np.zeros((3, num_tokens), np.int32)
        data = rng.integers(2, self.V, num)
        token_T[np.sort(rng.choice(num_tokens - num, num, replace=False))] = data
        token_T[-num:] = 1
        target_T[-num:] = data
        answer_id_T[-num:] = 1 + np.arange(num)
        return example.from_targets(token_T, target_T, answer_id_T)

    def chance(self, num_tokens: int) -> float:
        """Any data token."""
        return 1 / (self.V - 2)
