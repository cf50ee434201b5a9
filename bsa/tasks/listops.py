"""ListOps, as in the Long Range Arena: the value of a nested expression."""

import dataclasses

import numpy as np

from bsa.tasks import example

ASK, CLOSE = 15, 16
OPERATORS = {
    11: min,
    12: max,
    13: lambda values: int(np.median(values)),
    14: lambda values: sum(values) % 10,
}
"""Opening brackets, and what they make of their arguments: minimum, maximum, median, sum modulo 10."""

OPERATOR_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class ListOps:
    """Nested lists of digits (Nangia and Bowman, arXiv 1804.06028; lengths of Tay et al., arXiv 2011.04006).

    An argument is a list with probability 1/4, else a digit; a list has 2 to `max_arguments`; only expressions of a
    quarter of the text or more are taken. Zeros fill the front, and the value is asked for at the last token. Ids: 1 to
    10 are the digits 0 to 9.
    """

    max_depth: int = 10
    max_arguments: int = 10
    V: int = 17

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        example.check_room("listops", num_tokens, 8)
        expression, value = [], 0
        while not num_tokens // 4 <= len(expression) < num_tokens:
            expression = []
            value = self._write(expression, 1, num_tokens, rng)
        token_T, target_T, answer_id_T = np.zeros((3, num_tokens), np.int32)
        token_T[-1 - len(expression) :] = [*expression, ASK]
        target_T[-1], answer_id_T[-1] = 1 + value, 1
        return example.from_targets(token_T, target_T, answer_id_T)

    def chance(self, num_tokens: int) -> float:
        """Any digit. Values are not equally likely: who always says 0, or 9, scores 0.16 (1,200 draws)."""
        return 0.1

    def _write(self, expression, depth, limit, rng):
        """Appends a random expression and returns its value; nonsense once it is longer than the limit."""
        is_list = depth == 1 or rng.random() < OPERATOR_SHARE
        if not is_list or depth == self.max_depth or len(expression) > limit:
            digit = int(rng.integers(10))
            expression.append(1 + digit)
            return digit
        operator = int(rng.integers(min(OPERATORS), max(OPERATORS) + 1))
        expression.append(operator)
        values = [
            self._write(expression, depth + 1, limit, rng)
            for _ in range(rng.integers(2, self.max_arguments + 1))
        ]
        expression.append(CLOSE)
        return OPERATORS[operator](values)
