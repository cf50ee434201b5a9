"""Which documents are held out for evaluation: by a hash of the name alone."""

import hashlib

import numpy as np

from bsa.tasks import corpus as corpus_lib


def hash_name(name: str) -> int:
    """A number in [0, 2**64) that hangs on the name only: not on machine, run or order."""
    name_bytes = name.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name_bytes, digest_size=8).digest(), "big")


def heldout(name: str, percent: int) -> bool:
    """Whether a document is held out; raising `percent` only adds documents."""
    return hash_name(name) % 100 < percent


def split(corpus: corpus_lib.Corpus, percent: int) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers of the training side and of the held-out side, int64, ascending.

    Raises:
        ValueError: one side has no document of at least 2 bytes, which predicts nothing.
    """
    held = np.array([heldout(name, percent) for name in corpus.names], bool)
    usable = corpus.sizes >= 2
    train_ids, heldout_ids = (
        np.flatnonzero(usable & ~held),
        np.flatnonzero(usable & held),
    )
    for side, ids in ("training", train_ids), ("held-out", heldout_ids):
        if not len(ids):
            raise ValueError(
                f"data: no {side} document: {len(corpus.names)} documents at"
                f" heldout_percent={percent}; add documents or change heldout_percent"
            )
    return train_ids, heldout_ids
