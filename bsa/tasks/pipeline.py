"""Batches of tokens: what `bsa/train` feeds to the model, in training and evaluation.

Every process makes the same batches and hands its devices their parts, so that a run may
go on with another number of processes or devices. Every batch is a dict of numpy arrays:
    token_BT: int32 in [0, 256), the bytes; 0 on padding.
    target_BT: int32, the byte that follows in the same document; 0 on padding.
    weight_BT: float32, 1 where the target counts, else 0.
    segment_id_BT: int32, 1, 2, .. for the documents of a row, 0 on padding, which is at
        the row's end. With `cross_document`, all real tokens are segment 1.
    position_BT: int32, position within the piece of a document, 0 on padding. With
        `cross_document`, position within the row.
The same settings and corpus give the same batches bit for bit: threads read ahead, and
never decide an order.
"""

import functools
import math
import sys

import grain
import numpy as np

from bsa.tasks import corpus as corpus_lib
from bsa.tasks import passkey, split
from bsa.tasks import pieces as pieces_lib
from bsa.tasks import settings as settings_lib

# Texts read ahead. Measured 2026-11 on one CPU core, stdlib, T=8192: 38M tokens/s; with
# grain's own 16 threads and 500 texts 16M, and at T=1M those texts would take 1 GB.
_READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=32)

# Depths of training passkeys are drawn from so much beyond both ends, and clipped: each twelfth begins its document. A
# model that hardly saw such keys finds them in 16K tokens, but not in 128K or 1M, where it finds others (LOG.md).
_BEYOND_ENDS = 0.1


def train_batches(
    corpus: corpus_lib.Corpus, settings: settings_lib.DataSettings
) -> grain.IterDataset:
    """Endless batches of shuffled training text, with passkey documents mixed in.

    An epoch reads each piece once, in an order of its own. Every target of a passkey document counts, as in any other. The iterator's state
    (`get_state`, `set_state`, `grain.checkpoint.CheckpointSave`) names the exact next
    batch. Close it (`close()`) in a `finally`: its thread, if still alive when an error
    ends Python, aborts the process (SIGABRT in place of exit code 1).

    Raises:
        ValueError: a side of the split is empty.
    """
    train_ids, _ = split.split(corpus, settings.heldout_percent)
    pieces = pieces_lib.Pieces(corpus, train_ids, settings.T)
    texts = grain.MapDataset.source(pieces)
    texts = texts.seed(settings.seed).shuffle().repeat()
    if settings.passkey_share:
        make_passkey = functools.partial(_train_passkey, corpus, train_ids, settings)
        numbers = grain.MapDataset.range(sys.maxsize)
        share = settings.passkey_share
        texts = grain.MapDataset.mix(
            [texts, numbers.map(make_passkey)], weights=[1 - share, share]
        )
    batches = _pack(texts, settings, seed=settings.seed)
    batches = batches.batch(settings.B, drop_remainder=True)
    return _finish(batches, settings)


def heldout_batches(
    corpus: corpus_lib.Corpus,
    settings: settings_lib.DataSettings,
    num_batches: int,
) -> grain.IterDataset:
    """Up to `num_batches` batches of held-out text, the same whatever `settings.seed` is.

    Pieces are spread over the documents, so that few batches sample many. If the text
    ends first, the last batch is filled up with rows of padding, of weight 0.

    Raises:
        ValueError: a side of the split is empty, or `num_batches` is below 1.
    """
    _, heldout_ids = split.split(corpus, settings.heldout_percent)
    pieces = pieces_lib.Pieces(corpus, heldout_ids, settings.T)
    texts = grain.MapDataset.source(pieces.spread_order()).map(pieces.__getitem__)

    def fill_up(packed_B):
        full_B = np.zeros((settings.B, *packed_B.shape[1:]), packed_B.dtype)
        full_B[: len(packed_B)] = packed_B
        return full_B

    batches = _pack(texts, settings, seed=0).batch(settings.B)
    batches = batches.map(
        lambda packed: {name: fill_up(rows) for name, rows in packed.items()}
    )
    return _finish(grain.experimental.LimitIterDataset(batches, num_batches), settings)


def passkey_batch(
    corpus: corpus_lib.Corpus,
    settings: settings_lib.DataSettings,
    num_tokens: int,
    depth: float,
    num_samples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Passkey documents in held-out text: B=num_samples rows of T=num_tokens.

    Only the digits of the answer have weight. The same seed hides the same keys in the
    same text at every depth.

    Raises:
        ValueError: `num_tokens` is too short or depth is outside [0, 1]; see `passkey`.
    """
    _, heldout_ids = split.split(corpus, settings.heldout_percent)
    text_BS = np.empty((num_samples, num_tokens + 1), np.int32)  # S = T + 1
    weight_BT = np.zeros((num_samples, num_tokens), np.float32)
    for sample in range(num_samples):
        text, answer = passkey.make_document(
            corpus,
            heldout_ids,
            num_tokens=num_tokens,
            depth=depth,
            rng=np.random.default_rng((seed, sample)),
        )
        text_BS[sample] = np.frombuffer(text, np.uint8)
        weight_BT[sample, answer.start - 1 : answer.stop - 1] = 1
    position_BT = np.tile(np.arange(num_tokens, dtype=np.int32), (num_samples, 1))
    return {
        "token_BT": text_BS[:, :-1],
        "target_BT": text_BS[:, 1:],
        "weight_BT": weight_BT,
        "segment_id_BT": np.ones_like(position_BT),
        "position_BT": position_BT,
    }


def _train_passkey(corpus, document_ids, settings, number) -> np.ndarray:
    """Passkey document `number` of the run: log-uniform length, uniform depth, more at the ends."""
    rng = np.random.default_rng((settings.seed, number))
    shortest, longest = settings.passkey_min_tokens, settings.T
    num_tokens = math.floor(shortest * ((longest + 1) / shortest) ** rng.random())
    text, _ = passkey.make_document(
        corpus,
        document_ids,
        num_tokens=min(num_tokens, longest),
        depth=float(np.clip(rng.uniform(-_BEYOND_ENDS, 1 + _BEYOND_ENDS), 0, 1)),
        rng=rng,
    )
    return np.frombuffer(text, np.uint8)


def _pack(texts: grain.MapDataset, settings, *, seed: int) -> grain.IterDataset:
    """Rows of T (token, target) pairs: one feature, so the packer counts only once."""
    pairs = texts.map(lambda text: {"pair": np.stack([text[:-1], text[1:]], axis=1)})
    return grain.experimental.FirstFitPackIterDataset(
        pairs.to_iter_dataset(_READ_AHEAD),
        length_struct={"pair": settings.T},
        num_packing_bins=settings.packing_bins,
        seed=seed,
    )


def _finish(batches: grain.IterDataset, settings) -> grain.IterDataset:
    """Packed pairs to the batches of this module's docstring, made ahead by a thread."""

    def name_arrays(packed):
        pair_BT2, segment_id_BT = packed["pair"], packed["pair_segment_ids"]
        position_BT = packed["pair_positions"]
        real_BT = segment_id_BT > 0
        if settings.cross_document:
            segment_id_BT = real_BT.astype(np.int32)
            position_BT = np.arange(settings.T, dtype=np.int32) * segment_id_BT
        return {
            "token_BT": pair_BT2[..., 0].astype(np.int32),
            "target_BT": pair_BT2[..., 1].astype(np.int32),
            "weight_BT": real_BT.astype(np.float32),
            "segment_id_BT": segment_id_BT,
            "position_BT": position_BT,
        }

    return grain.experimental.ThreadPrefetchIterDataset(
        batches.map(name_arrays), prefetch_buffer_size=settings.prefetch_batches
    )
