"""Hides a key in real text and asks for it at the end: does a model read that far?

The wording follows Landmark Attention (Mohtashami and Jaggi, 2023); the filler is real
text in place of one repeated sentence.
"""

import numpy as np

from bsa.tasks import corpus as corpus_lib

NUM_DIGITS = 5
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is {key}."
# The shortest document has one byte of filler: num_tokens + 1 = needle + question + 1.
MIN_TOKENS = len((NEEDLE + QUESTION).format(key="0" * NUM_DIGITS))


def make_document(
    corpus: corpus_lib.Corpus,
    document_ids: np.ndarray,
    *,
    num_tokens: int,
    depth: float,
    rng: np.random.Generator,
) -> tuple[bytes, slice]:
    """Real text that hides a random key of `NUM_DIGITS` digits, and asks for it.

    Args:
        document_ids: documents that the filler is drawn from.
        num_tokens: length as inputs or targets; the text has one byte more.
        depth: where the key hides: 0 before all filler, 1 right before the question.
        rng: decides key and filler, in the same way at every depth.
    Returns:
        The text, num_tokens + 1 bytes, and the slice of it that is the answer: the digits
        after the question. Byte i of the text is target i - 1, so the targets of the
        answer are [answer.start - 1, answer.stop - 1). A full stop follows the answer.
    Raises:
        ValueError: `num_tokens` is below `MIN_TOKENS`, or depth is outside [0, 1].
    """
    if num_tokens < MIN_TOKENS:
        raise ValueError(
            f"passkey: num_tokens={num_tokens} has no room for the key and the question;"
            f" at least {MIN_TOKENS} tokens are needed"
        )
    if not 0 <= depth <= 1:
        raise ValueError(f"passkey: depth={depth} must lie in [0, 1]")
    key = str(rng.integers(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))
    filler = _draw_filler(corpus, document_ids, num_tokens + 1 - MIN_TOKENS, rng)
    cut = round(depth * len(filler))
    needle, question = NEEDLE.format(key=key), QUESTION.format(key=key)
    text = filler[:cut] + needle.encode() + filler[cut:] + question.encode()
    start = len(text) - len(question) + question.index(key)
    return text, slice(start, start + NUM_DIGITS)


def _draw_filler(
    corpus: corpus_lib.Corpus,
    document_ids: np.ndarray,
    num_bytes: int,
    rng: np.random.Generator,
) -> bytes:
    """Part of a random document; whole documents before it while they are too short."""
    parts, missing = [], num_bytes
    while missing:
        document_id = int(document_ids[rng.integers(len(document_ids))])
        size = int(corpus.sizes[document_id])
        start = int(rng.integers(max(size - missing, 0) + 1))
        parts.append(corpus.read(document_id, start, min(start + missing, size)))
        missing -= len(parts[-1])
    return b"".join(parts)
