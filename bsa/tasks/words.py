"""Tokens of the tasks that read a text: marks, digits, words; and the filler between what matters.

One vocabulary for needles, chains and counts, so that one model can learn them together. A token-level rendering of
RULER (Hsieh et al., arXiv 2404.06654): what is English there is a mark here.
"""

import numpy as np

STOP, AND, IS, ASK, NEEDLE, VAR, FINAL, LIST, COMMON, FREQUENT = range(1, 11)
FIRST_DIGIT, FIRST_HEX, FIRST_WORD = 16, 32, 64
V = 512
"""Ids below `FIRST_WORD` are marks and digits, 0 is never used; the others are words."""

CODES = {
    "name": (FIRST_WORD, V - FIRST_WORD, 2),
    "short_number": (FIRST_DIGIT, 10, 5),
    "number": (FIRST_DIGIT, 10, 7),
    "uuid": (FIRST_HEX, 16, 8),
}
"""Kinds of keys and values: first id, number of ids, tokens."""

LOOP = np.arange(FIRST_WORD, FIRST_WORD + 20)
"""The one sentence that RULER calls noise, repeated."""


def draw_codes(kind: str, num: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct codes of a kind of `CODES`: int64[num, tokens].

    Raises:
        ValueError: there are not so many.
    """
    first, base, length = CODES[kind]
    if num > base**length:
        raise ValueError(f"{kind}: {num} distinct ones of {base**length}")
    code = rng.choice(base**length, num, replace=False)
    return first + code[:, None] // base ** np.arange(length) % base


def draw_filler(kind: str, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """The loop, or words drawn one by one with shares ~ 1/rank: int64[num_tokens]."""
    if kind == "loop":
        return np.resize(LOOP, num_tokens)
    share = np.cumsum(1 / np.arange(1, V - FIRST_WORD + 1))
    rank = np.searchsorted(share, rng.random(num_tokens) * share[-1], side="right")
    return FIRST_WORD + rank


def strew(
    statements: list[np.ndarray], filler: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The statements in their order, at random places of the filler."""
    cuts = np.sort(rng.integers(len(filler) + 1, size=len(statements)))
    first, *rest = np.split(filler, cuts)
    return np.concatenate(
        [first, *(part for pair in zip(statements, rest) for part in pair)]
    )


def listed(parts) -> np.ndarray:
    """Parts with `AND` between them."""
    joined = [piece for part in parts for piece in ([AND], part)]
    return np.concatenate([np.zeros(0, int), *joined[1:]])


def question(mark: int, asked, answers) -> tuple[np.ndarray, np.ndarray]:
    """The question and its answers: tokens, and the answer each belongs to (0 for none)."""
    head = np.concatenate([[mark], listed(asked), [IS]])
    ids = listed([np.full(len(part), i + 1) for i, part in enumerate(answers)])
    tail = listed(answers)
    ids = np.where(tail == AND, 0, ids)
    return np.concatenate([head, tail]), np.concatenate([np.zeros_like(head), ids])


def joined(questions) -> tuple[np.ndarray, np.ndarray]:
    """Questions one after another, their answers counted on."""
    tokens, ids = zip(*questions)
    first = np.cumsum([0, *(one.max() for one in ids[:-1])])
    counted = [np.where(one > 0, one + n, 0) for one, n in zip(ids, first)]
    return np.concatenate(tokens), np.concatenate(counted)
