"""RULER's two tasks of aggregation: which words are the most common? No few blocks hold the answer."""

import dataclasses

import numpy as np
from scipy import special

from bsa.tasks import example, words

WORD_LEN = words.CODES["name"][2]


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A shuffled list in which a few words come often and all others seldom.

    `LIST word word ..`, then `COMMON IS` wants the common words in the order of their first appearance. A word is two
    tokens, and the list has no numbers and no worked example. As many rare words as there is room for; the loop fills
    the rest, in front.
    """

    num_common: int = 10
    times_common: int = 30
    times_rare: int = 3
    V: int = words.V

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        num_rare = self._num_rare(num_tokens)
        word = words.draw_codes("name", 1, self.num_common + num_rare, rng)[0]
        times = np.repeat(
            [self.times_common, self.times_rare], [self.num_common, num_rare]
        )
        shuffled = rng.permutation(np.repeat(np.arange(len(word)), times))
        seen, first = np.unique(shuffled, return_index=True)
        common = np.argsort(first[seen < self.num_common])
        text = word[shuffled]
        return _asked(text, words.COMMON, word[common], words.LOOP, num_tokens)

    def chance(self, num_tokens: int) -> float:
        """One of the words in the list."""
        return 1 / (self.num_common + self._num_rare(num_tokens))

    def _num_rare(self, num_tokens):
        fixed = _end_len(self.num_common) + self.num_common * self.times_common * 2
        example.check_room("common_words", num_tokens, fixed + 2 * self.times_rare - 1)
        return (num_tokens + 1 - fixed) // (WORD_LEN * self.times_rare)


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Words whose counts fall with a power of their rank; rank 1 is noise, ranks 2 to 4 are asked for, in that order.

    `LIST word word ..`, then `FREQUENT IS`. The k-th word comes floor(n / (k^alpha zeta(alpha))) times among n; there
    are T/50 words, of which those counted 0 are missing; more of the noise fills the rest.
    """

    alpha: float = 2.0
    V: int = words.V

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        times = self._times(num_tokens)
        word = words.draw_codes("name", 1, len(times), rng)[0]
        word[0] = words.STOP
        shuffled = rng.permutation(np.repeat(np.arange(len(times)), times))
        text, noise = word[shuffled], word[0]
        return _asked(text, words.FREQUENT, word[1:4], noise, num_tokens)

    def chance(self, num_tokens: int) -> float:
        """One of the words in the list, but for the noise."""
        return 1 / (len(self._times(num_tokens)) - 1)

    def _times(self, num_tokens):
        """How often the words come, by rank, noise first; at least 1."""
        num_words = (num_tokens + 1 - _end_len(3)) // WORD_LEN
        rank = np.arange(1, max(num_tokens // 50, 5) + 1)
        times = num_words * rank**-self.alpha / special.zeta(self.alpha)
        times = times.astype(int)
        if (np.diff(times[1:5]) >= 0).any():
            raise ValueError(
                f"frequent_words: num_tokens={num_tokens} is too short to tell ranks 2 to 5"
                " apart by their counts; use more"
            )
        times = times[times > 0]
        times[0] += num_words - times.sum()
        return times


def _end_len(num_answers):
    """Tokens of `LIST`, the question's two, and the answers with `AND` between them."""
    return 1 + 2 + num_answers * (WORD_LEN + 1) - 1


def _asked(shuffled, mark, answers, filler, num_tokens):
    """Filler, list, question and answers."""
    end, end_id = words.question(mark, answers[:0], answers)
    text = np.concatenate([[words.LIST], shuffled.ravel()])
    filler = np.resize(filler, num_tokens + 1 - len(text) - len(end))
    answer_id = np.concatenate([np.zeros(len(filler) + len(text), int), end_id])
    return example.from_text(np.concatenate([filler, text, end]), answer_id)
