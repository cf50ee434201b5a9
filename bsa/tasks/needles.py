"""RULER's eight needle tasks: values hidden under keys, asked for at the end of the text."""

import dataclasses

import numpy as np

from bsa.tasks import example, words

HAYSTACKS = ("loop", "words", "needles")


@dataclasses.dataclass(frozen=True)
class Needles(example.BatchTask):
    """Statements `NEEDLE key IS value STOP` in a haystack, then `ASK keys IS values`.

    Needles lie anywhere, in random order. Several keys are asked for at once, and several values of a key answered in
    the order of the text: so each token of the answer has one right value.

    Attributes:
        haystack: "loop" (one sentence, repeated), "words" (random words), or "needles" (others of the same form; what
            has no room for one is filled by the loop, in front).
        key, value: kinds of `words.CODES`.
        num_keys: needles' keys, those asked for included, besides a haystack's.
        num_values: values of each key, each in a needle of its own.
        num_asked: keys asked for at once.
        num_questions: for other keys each, one after another. To learn by: more is asked of a text.
    """

    haystack: str = "words"
    key: str = "name"
    value: str = "number"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1
    num_questions: int = 1
    V: int = words.V

    def __post_init__(self):
        if self.haystack not in HAYSTACKS or not {self.key, self.value} <= {
            *words.CODES
        }:
            raise ValueError(
                f"needles: haystack={self.haystack!r}, key={self.key!r}, value={self.value!r};"
                f" haystacks are {', '.join(HAYSTACKS)}, the others {', '.join(words.CODES)}"
            )
        if not 1 <= self.num_asked * self.num_questions <= self.num_keys:
            raise ValueError(
                f"needles: num_asked={self.num_asked}, num_questions={self.num_questions} of num_keys={self.num_keys} keys"
            )

    def draw_many(
        self, num_tokens: int, rng: np.random.Generator, num: int
    ) -> example.Examples:
        num_keys = self._num_keys(num_tokens)
        key_BKL = words.draw_codes(self.key, num, num_keys, rng)
        # Needles are in the order of the text; `owner` says whose value one holds.
        owner_N = np.repeat(np.arange(num_keys), self.num_values)
        owner_BN = rng.permuted(np.tile(owner_N, (num, 1)), axis=1)
        value_BNL = words.draw_codes(self.value, num, len(owner_N), rng)

        def column(mark):
            return np.full((*owner_BN.shape, 1), mark)

        name_BNL = np.take_along_axis(key_BKL, owner_BN[..., None], axis=1)
        parts = [column(words.NEEDLE), name_BNL, column(words.IS), value_BNL]
        needle_BNL = np.concatenate([*parts, column(words.STOP)], axis=2)
        end_BS, end_id_S = self._questions(key_BKL, value_BNL, owner_BN, rng)

        space = num_tokens + 1 - needle_BNL[0].size - len(end_id_S)
        if self.haystack == "needles":
            filler_BT = words.draw_filler("loop", num, space, rng)
            text = [filler_BT, needle_BNL.reshape(num, -1)]
        else:
            filler_BT = words.draw_filler(self.haystack, num, space, rng)
            text = [words.strew(needle_BNL, filler_BT, rng)]
        text_BT = np.concatenate([*text, end_BS], axis=1)
        before = np.zeros(text_BT.shape[1] - len(end_id_S), int)
        return example.from_texts(text_BT, np.concatenate([before, end_id_S]))

    def _questions(self, key_BKL, value_BNL, owner_BN, rng):
        """For other keys each: tokens, and the answers that they belong to."""
        num, num_keys, _ = key_BKL.shape
        wanted = (num, self.num_questions, self.num_asked)
        order_BK = rng.permuted(np.tile(np.arange(num_keys), (num, 1)), axis=1)
        asked_BQA = order_BK[:, : wanted[1] * wanted[2]].reshape(wanted)
        # A key's needles, in the order of the text.
        needle_BKM = np.argsort(owner_BN, axis=1, kind="stable")
        needle_BKM = needle_BKM.reshape(num, num_keys, self.num_values)
        row = np.arange(num)[:, None, None]
        answer_BQAML = value_BNL[row[..., None], needle_BKM[row, asked_BQA]]
        answer_BQNL = answer_BQAML.reshape(*wanted[:2], -1, value_BNL.shape[-1])
        asked_BQAL = key_BKL[row, asked_BQA]
        return words.joined(*words.question(words.ASK, asked_BQAL, answer_BQNL))

    def chance(self, num_tokens: int) -> float:
        """One of the values in the text; if there is but one, a random one of its kind."""
        num = self._num_keys(num_tokens) * self.num_values
        _, base, length = words.CODES[self.value]
        return 1 / num if num > 1 else 1 / base**length

    def _num_keys(self, num_tokens):
        """Keys of a text that long, a haystack's included."""
        key_len, value_len = words.CODES[self.key][2], words.CODES[self.value][2]
        needle_len = self.num_values * (3 + key_len + value_len)
        answers = self.num_asked * self.num_values
        end_len = self.num_asked * (key_len + 1) + answers * (value_len + 1)
        end_len *= self.num_questions
        space = num_tokens + 1 - end_len
        example.check_room(
            "needles", num_tokens, end_len - 1 + self.num_keys * needle_len
        )
        return space // needle_len if self.haystack == "needles" else self.num_keys
