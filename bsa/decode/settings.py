"""How a text is kept and how tokens are drawn. Checked once, static everywhere below."""

import dataclasses

STORES = ("model", "int8")


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """Room for keys, values and bookmarks.

    Attributes:
        capacity_tokens: tokens of a row that find room, prompt and answer; rounded up to whole key blocks by `cache`.
        piece_tokens: tokens of a row that are read at once; bounds the memory of scores, and window and chunked layers
            keep that many more keys than they need.
        store: of keys and values: "model" (the model's dtype) or "int8" (with a float32 scale a token and head).
    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    piece_tokens: int = 1024
    store: str = "model"

    def __post_init__(self):
        if self.capacity_tokens < 1 or self.piece_tokens < 1:
            raise ValueError(
                f"decode: capacity_tokens={self.capacity_tokens} and piece_tokens={self.piece_tokens} must be at least 1"
            )
        if self.store not in STORES:
            raise ValueError(
                f"decode: store={self.store!r} is not one of {', '.join(STORES)}"
            )
