"""How a text is kept, by what it is read and asked about, and how tokens are drawn. Checked once, static everywhere below."""

import dataclasses

from bsa.model import settings as model_settings

STORES = ("model", "int8", "host")


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """Room for keys, values and bookmarks.

    Attributes:
        capacity_tokens: tokens of a row that find room, prompt and answer; rounded up to whole key blocks by `cache`.
        piece_tokens: tokens of a row that are read at once; bounds the memory of scores, and window and chunked layers
            keep that many more keys than they need.
        store: of keys and values: "model" (the model's dtype), "int8" (with a float32 scale a token and head) or "host"
            (those of bookmark layers in the host's memory, see `host`).
        kept_tokens: bookmark layers keep the blocks of so many tokens, and of the others their bookmarks, see `pages`;
            0: all.
    Raises:
        ValueError: a value is out of range.
    """

    capacity_tokens: int
    piece_tokens: int = 1024
    store: str = "model"
    kept_tokens: int = 0

    def __post_init__(self):
        if self.capacity_tokens < 1 or self.piece_tokens < 1:
            raise ValueError(
                f"decode: capacity_tokens={self.capacity_tokens} and piece_tokens={self.piece_tokens} must be at least 1"
            )
        if self.kept_tokens < 0:
            raise ValueError(f"decode: kept_tokens={self.kept_tokens} is negative")
        if self.store not in STORES:
            raise ValueError(
                f"decode: store={self.store!r} is not one of {', '.join(STORES)}"
            )


@dataclasses.dataclass(frozen=True)
class ReadingSettings:
    """By what a text, and the question and answer after it, choose what they read.

    Attributes:
        granularity: `index.granularity` of text and question, see `configs/base.py`; a file of what was read is asked about
            by the same.
        answer_route: "flat": question and answer look through all bookmarks, however the text was read: few tokens, so it
            costs little, and finds what two levels of chapters miss in millions of tokens. "": by the model's route.
        answer_X: shortlist of question and answer, whose exact keys pick the blocks, see `index.X`; 0: the model's own.
        answer_temperature_tokens: `model.temperature_tokens` of question and answer; 0: the model's own.
        answer_temperature_gain: `model.temperature_gain` of question and answer; 0: the model's own.
    """

    granularity: str = "token"
    answer_route: str = ""
    answer_X: int = 0
    answer_temperature_tokens: int = 0
    answer_temperature_gain: float = 0.0

    def models(
        self, model: model_settings.ModelSettings
    ) -> tuple[model_settings.ModelSettings, model_settings.ModelSettings]:
        """The model as it reads a text, and as it is asked about one: with room in its lists for all that is chosen.

        Raises:
            ValueError: it cannot be read or asked so.
        """
        reading = model.with_room().read_by(self.granularity)
        return reading, reading.answer_by(
            self.answer_route,
            self.answer_X,
            self.answer_temperature_tokens,
            self.answer_temperature_gain,
        )


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn, and when to end.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens may be drawn; 0: all.
        top_p: only the likeliest tokens that together hold this probability; 1: all.
        seed: of the draws; a row's draws depend on it and on the row's number alone.
        max_tokens: longest answer.
        stop: sequences of tokens; an answer ends with the first of them that it contains.
        tokens_a_call: how many tokens one compiled call draws, with nothing on the host between them; each comes out when
            all are drawn. On a GPU a token alone waits longer for its kernels to be launched than for them to run. 0: a
            call for each layer, which layers of one kind share: compiled in a fraction of the time where a model has many
            layers; as fast after that on a CPU, and a sixth as fast on an H200, where the host is waited for.
    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[tuple[int, ...], ...] = ()
    tokens_a_call: int = 8

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"decode: temperature={self.temperature} and top_k={self.top_k} cannot be negative, and "
                f"top_p={self.top_p} must lie in (0, 1]"
            )
        if self.max_tokens < 1 or self.tokens_a_call < 0:
            raise ValueError(
                f"decode: max_tokens={self.max_tokens} must be at least 1, and tokens_a_call={self.tokens_a_call} at least 0"
            )
        if not all(self.stop):
            raise ValueError("decode: an empty stop sequence would end every answer")
