"""RULER's eight needle tasks: values hidden under keys, asked for at the end of the text."""

import dataclasses

import numpy as np

from bsa.tasks import example, words

HAYSTACKS = ("loop", "words", "needles")


@dataclasses.dataclass(frozen=True)
class Needles:
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

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        num_keys = self._num_keys(num_tokens)
        num = num_keys * self.num_values
        key = words.draw_codes(self.key, num_keys, rng)
        # A row a needle, in the order of the text; `owner` says whose value it holds.
        owner = rng.permutation(np.repeat(np.arange(num_keys), self.num_values))
        value = words.draw_codes(self.value, num, rng)

        def column(mark):
            return np.full((num, 1), mark)

        needle = [column(words.NEEDLE), key[owner], column(words.IS), value]
        needle = np.concatenate([*needle, column(words.STOP)], axis=1)
        asked = rng.choice(
            num_keys, (self.num_questions, self.num_asked), replace=False
        )
        questions = [
            words.question(
                words.ASK, key[keys], [v for i in keys for v in value[owner == i]]
            )
            for keys in asked
        ]
        end, end_id = words.joined(questions)

        space = num_tokens + 1 - needle.size - len(end)
        if self.haystack == "needles":
            filler = words.draw_filler("loop", space, rng)
            text = np.concatenate([filler, needle.ravel()])
        else:
            filler = words.draw_filler(self.haystack, space, rng)
            text = words.strew(list(needle), filler, rng)
        answer_id = np.concatenate([np.zeros_like(text), end_id])
        return example.from_text(np.concatenate([text, end]), answer_id)

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
