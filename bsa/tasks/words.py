"""Tokens of the tasks that read a text: marks, digits, words; and the filler between what matters.

One vocabulary for needles, chains and counts, so that one model can learn them together. A token-level rendering of
RULER (Hsieh et al., arXiv 2404.06654): what is English there is a mark here.
"""

import numpy as np

from bsa.tasks import example

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


def draw_codes(
    kind: str, num_texts: int, num: int, rng: np.random.Generator
) -> np.ndarray:
    """Codes of a kind of `CODES`, distinct within a text: int64[num_texts, num, tokens].

    Raises:
        ValueError: there are not so many.
    """
    first, base, length = CODES[kind]
    if num > base**length:
        raise ValueError(f"{kind}: {num} distinct ones of {base**length}")
    code_BN = example.draw_distinct(rng, base**length, (num_texts, num))
    return first + code_BN[..., None] // base ** np.arange(length) % base


def draw_filler(
    kind: str, num_texts: int, num_tokens: int, rng: np.random.Generator
) -> np.ndarray:
    """The loop, or words drawn one by one with shares ~ 1/rank: int64[num_texts, num_tokens]."""
    if kind == "loop":
        return np.tile(np.resize(LOOP, num_tokens), (num_texts, 1))
    share = np.cumsum(1 / np.arange(1, V - FIRST_WORD + 1))
    drawn_BT = rng.random((num_texts, num_tokens)) * share[-1]
    return FIRST_WORD + np.searchsorted(share, drawn_BT, side="right")


def strew(
    statement_BNL: np.ndarray, filler_BT: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The statements of each text in their order, at random places of its filler: int64[B, tokens].

    Args:
        statement_BNL: statements of a text, as many tokens in all of them as in another's; 0 ends those below L tokens.
    """
    num_texts, num_filler = filler_BT.shape
    cut_BN = rng.integers(num_filler + 1, size=statement_BNL.shape[:2])
    cut_BN.sort(axis=1)
    is_told_BNL = statement_BNL > 0
    count_BX = np.cumsum(is_told_BNL.reshape(num_texts, -1), axis=1)
    place_BNL = cut_BN[..., None] + count_BX.reshape(is_told_BNL.shape) - 1
    text_BT = np.zeros((num_texts, num_filler + count_BX[0, -1]), int)
    text_BT[np.nonzero(is_told_BNL)[0], place_BNL[is_told_BNL]] = statement_BNL[
        is_told_BNL
    ]
    text_BT[text_BT == 0] = filler_BT.ravel()
    return text_BT


def listed(part_NL: np.ndarray) -> np.ndarray:
    """The N parts with `AND` between them, also with more axes in front: int64[..., N * (L + 1) - 1]."""
    and_N1 = np.full((*part_NL.shape[:-1], 1), AND)
    joined = np.concatenate([part_NL, and_N1], axis=-1)
    return joined.reshape(*part_NL.shape[:-2], -1)[..., :-1]


def question(
    mark: int, asked_AL: np.ndarray, answer_NL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The question and its answers, also with more axes in front of both.

    Returns:
        int64[..., tokens], and the answer that each token belongs to (0 for none), int64[tokens].
    """
    *axes, num, length = answer_NL.shape
    first, last = (np.full((*axes, 1), token) for token in (mark, IS))
    head = np.concatenate([first, listed(asked_AL), last], axis=-1)
    # The answers' tokens, and an `AND` after each but the last.
    id_NL = np.zeros((num, length + 1), int)
    id_NL[:, :-1] = 1 + np.arange(num)[:, None]
    answer_id = np.concatenate([np.zeros(head.shape[-1], int), id_NL.ravel()[:-1]])
    return np.concatenate([head, listed(answer_NL)], axis=-1), answer_id


def joined(token_BQS: np.ndarray, answer_id_S: np.ndarray):
    """The Q questions of a text one after another, and their answers counted on: int64[B, Q * S], int64[Q * S]."""
    token_BX = token_BQS.reshape(len(token_BQS), -1)
    first_Q1 = answer_id_S.max() * np.arange(token_BQS.shape[1])[:, None]
    return token_BX, np.where(answer_id_S > 0, answer_id_S + first_Q1, 0).ravel()
