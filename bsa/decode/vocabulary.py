"""Text to tokens and back: bytes, or the pieces of a published model (`bsa.train.transfer`). Called by `command`."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no UTF-8, such as the first ones of a character whose others are still to come."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How a model writes.

    Attributes:
        begin: the tokens of a text's beginning, with what the model expects there.
        go_on: the tokens of what follows.
        decode: the text of tokens, `UNKNOWN` where it is no UTF-8.
        end: tokens that end an answer.
    """

    begin: Callable[[str], Sequence[int]]
    go_on: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    end: tuple[int, ...] = ()


def _to_bytes(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


BYTES = Vocabulary(
    _to_bytes,
    _to_bytes,
    lambda tokens: bytes(token % 256 for token in tokens).decode("utf-8", "replace"),
)


class Writer:
    """Tokens, one after another, to what they add to the text: whole characters, as soon as they are whole.

    Attributes:
        text: all that was written.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.text = ""
        self._decode = vocabulary.decode
        self._tokens: list[int] = []  # of the last line
        self._shown = 0

    def add(self, token: int) -> str:
        """What is new with one more token."""
        self._tokens.append(token)
        line = self._decode(self._tokens)
        new = self._show(line.rstrip(UNKNOWN))
        if line.endswith("\n"):
            self._tokens, self._shown = [], 0
        return new

    def close(self) -> str:
        """What is left when no token follows."""
        return self._show(self._decode(self._tokens))

    def _show(self, line):
        new = line[self._shown :]
        self._shown = max(self._shown, len(line))
        self.text += new
        return new
