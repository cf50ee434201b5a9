"""Cuts documents into pieces that fit a row; `pipeline` packs them."""

from collections.abc import Sequence

import numpy as np

from bsa.tasks import corpus as corpus_lib
from bsa.tasks import split


class Pieces(Sequence):
    """Pieces of up to T + 1 bytes, read when they are asked for.

    Neighbouring pieces of a document share one byte, the last target of the one and the
    first token of the other: every byte but a document's first is predicted exactly once.
    Element i is uint8[length], 2 <= length <= T + 1.
    """

    def __init__(self, corpus: corpus_lib.Corpus, document_ids: np.ndarray, T: int):
        num_targets = corpus.sizes[document_ids] - 1
        num_pieces = -(-num_targets // T)
        first_piece = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        self._corpus = corpus
        self._document_ids = np.repeat(document_ids, num_pieces)
        self._starts = (np.arange(num_pieces.sum()) - first_piece) * T
        self._stops = np.minimum(self._starts + T + 1, corpus.sizes[self._document_ids])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, piece_id: int) -> np.ndarray:
        text = self._corpus.read(
            int(self._document_ids[piece_id]),
            int(self._starts[piece_id]),
            int(self._stops[piece_id]),
        )
        return np.frombuffer(text, np.uint8)

    def spread_order(self) -> np.ndarray:
        """Piece numbers in an order that mixes documents; it hangs on names only."""
        names = self._corpus.names
        keys = [
            split.hash_name(f"{start}/{names[document_id]}")
            for start, document_id in zip(self._starts, self._document_ids)
        ]
        return np.argsort(np.array(keys, np.uint64), kind="stable")
