"""What a decoder is made of. Checked once, static everywhere below."""

import dataclasses

from bsa.index import settings as index_settings
from bsa.model import rope

KINDS = "dswcbf"
POSITIONS = "rn"
REMATS = ("none", "layer", "dots", "offload")
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Sizes and kinds of a decoder's layers; `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: a size is impossible, or a pattern has an unknown letter.
    """

    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    L: int
    pattern: str
    positions: str
    window_tokens: tuple[int, ...]
    chunk_tokens: int
    qk_norm: bool
    rope_theta: float
    norm_eps: float
    dtype: str
    remat: str
    mlp_tokens: int
    implementation: str
    index: index_settings.IndexSettings
    rope_scaling: rope.Scaling = rope.UNSCALED
    qkv_bias: bool = False
    tied: bool = True
    route_width: int = 0
    route_before_rope: bool = False
    route_taps: int = 0
    score_weight: float = 0.0
    mass_weight: float = 0.0
    score_noise: float = 0.0
    taught_rows: int = 0
    branch_gates: bool = False
    span_mean_blocks: float = 2.0
    ask_again: bool = False
    temperature_tokens: int = 0
    temperature_gain: float = 0.1
    window_sinks: bool = True

    def __post_init__(self):
        for name in "DHGKFVL":
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model: {name}={getattr(self, name)} must be at least 1"
                )
        if self.H % self.G:
            raise ValueError(
                f"model: H={self.H} is no multiple of G={self.G}: query heads share key/value heads evenly"
            )
        if self.K % 2:
            raise ValueError(f"model: K={self.K} is odd; RoPE turns pairs")
        for name, letters in (("pattern", KINDS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if not value or set(value) - set(letters):
                raise ValueError(
                    f"model: {name}={value!r} has letters other than {', '.join(letters)}"
                )
        if self.L % len(self.pattern):
            raise ValueError(
                f"model: L={self.L} is no multiple of the {len(self.pattern)} layers of pattern {self.pattern!r}"
            )
        for name in ("positions", "window_tokens"):
            if len(getattr(self, name)) != len(self.pattern):
                raise ValueError(
                    f"model: {name}={getattr(self, name)!r} needs one entry for each letter of pattern {self.pattern!r}"
                )
        for kind, w in zip(self.pattern, self.window_tokens):
            if w < 1 or (kind != "s" and w % self.index.C):
                raise ValueError(
                    f"model: window_tokens={self.window_tokens} must be whole blocks of C={self.index.C} tokens"
                )
        for letter, kind in enumerate(self.pattern):
            owner = self.pattern.rfind("b", 0, letter)
            window_tokens = self.window_tokens[letter]
            if kind == "f" and (
                owner < 0 or self.window_tokens[owner] != window_tokens
            ):
                raise ValueError(
                    f"model: pattern={self.pattern!r} with window_tokens={self.window_tokens}: f reads the lists of a b before "
                    "it in the pattern, so both have the same window"
                )
        if self.mlp_tokens < 0:
            raise ValueError(
                f"model: mlp_tokens={self.mlp_tokens} cannot be negative; 0 is all at once"
            )
        if self.temperature_tokens < 0 or self.temperature_gain < 0:
            raise ValueError(
                f"model: temperature_tokens={self.temperature_tokens} and temperature_gain={self.temperature_gain} cannot be "
                "negative; 0 tokens is no temperature"
            )
        if self.chunk_tokens < 1:
            raise ValueError(
                f"model: chunk_tokens={self.chunk_tokens} must be at least 1"
            )
        self._check_choosing()
        if self.remat not in REMATS:
            raise ValueError(
                f"model: remat={self.remat!r} is not one of {', '.join(REMATS)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"model: dtype={self.dtype!r} is not one of {', '.join(DTYPES)}"
            )

    def _check_choosing(self):
        """By what bookmark layers choose and learn to choose."""
        if self.taught_rows < 0 or self.route_width < 0:
            raise ValueError(
                f"model: taught_rows={self.taught_rows} and route_width={self.route_width} cannot be negative; 0 is none"
            )
        if self.route_taps and not (
            self.route_width and 2 <= self.route_taps <= self.index.C
        ):
            raise ValueError(
                f"model: route_taps={self.route_taps} with route_width={self.route_width}: 2 to C={self.index.C} keys of the "
                "index's own are mixed, or 0 are; set route_width"
            )
        shortest, longest = self.index.span_min_blocks, self.index.span_blocks
        if self.index.spans == "learned" and not (
            max(1, shortest) < self.span_mean_blocks < longest
        ):
            raise ValueError(
                f"model: span_mean_blocks={self.span_mean_blocks} is to lie between index.span_min_blocks={shortest} and "
                f"index.span_blocks={longest}"
            )
        if self.mass_weight and self.H != self.G:
            raise ValueError(
                f"model: mass_weight={self.mass_weight} with H={self.H}, G={self.G}: heads that share a list give its blocks "
                "different mass; set G to H, or mass_weight to 0"
            )
        looks = self.index.route, self.index.X, self.index.query_pool
        if self.score_noise and looks != ("flat", 0, "mean"):
            raise ValueError(
                f"model: score_noise={self.score_noise} with index.route={looks[0]!r}, X={looks[1]}, query_pool={looks[2]!r}: "
                "noise is for scores that choose at once; set them to 'flat', 0 and 'mean'"
            )
        if self.index.X and (self.route_width or self.route_before_rope):
            raise ValueError(
                f"model: route_width={self.route_width}, route_before_rope={self.route_before_rope} with index.X={self.index.X}: "
                "the exact step reads attention's keys; set X to 0, or these to 0 and False"
            )
        if self.route_width and self.route_before_rope:
            raise ValueError(
                f"model: route_width={self.route_width} with route_before_rope=True: the index's own keys have no positions; "
                "set one to 0 or False"
            )

        placed = [p for p, kind in zip(self.positions, self.pattern) if kind == "b"]
        own = self.route_width or self.route_before_rope or self.branch_gates
        if self.ask_again and (own or "r" in placed):
            raise ValueError(
                f"model: ask_again=True with positions={self.positions!r}, route_width={self.route_width}, "
                f"route_before_rope={self.route_before_rope}, branch_gates={self.branch_gates}: what was found joins attention's own "
                "queries, which RoPE has not turned; set positions of b to n, and the others to 0 and False"
            )

    @property
    def is_biased(self) -> bool:
        """Whether bookmark layers add something to the logits of chosen blocks."""
        return bool(self.score_weight or self.mass_weight)

    def first_alike(self, letter: int) -> int:
        """The first place in the pattern that differs from `letter` by its parameters alone."""
        looks = list(zip(self.pattern, self.positions, self.window_tokens))
        return looks.index(looks[letter])

    def with_room(self) -> "ModelSettings":
        """The same model, with lists that have room for all that is chosen: for texts longer than those it learned on.

        There neighbours choose less alike, and what finds no room is what the latest tokens chose, see `unite.unite`.
        """
        index = self.index
        longest = index.longest_list(max(self.window_tokens))
        index = dataclasses.replace(index, J=max(index.J, longest))
        return dataclasses.replace(self, index=index)

    def read_by(self, granularity: str) -> "ModelSettings":
        """The same model, for reading prompts by another `index.granularity`."""
        index = dataclasses.replace(self.index, granularity=granularity)
        return dataclasses.replace(self, index=index)

    def answer_by(
        self,
        route: str,
        X: int = 0,
        temperature_tokens: int = 0,
        temperature_gain: float = 0.0,
    ) -> "ModelSettings":
        """The same model, for asking about what was read: by `index.route` (""), or "flat", through all bookmarks.

        By the flat route each token chooses for itself, however the text was read, and `index.query_block` of them at a
        time: all bookmarks of a long text are scored at once for each.

        Args:
            X: the shortlist whose exact keys pick the blocks; 0: that of reading.
            temperature_tokens: beyond so many tokens attention is sharper, see `configs/base.py`; 0: as in reading.
            temperature_gain: how much so; 0: `self.temperature_gain`.

        Raises:
            ValueError: another route, which would want chapters or links that the text was not read with; or X is less
                than `index.A`.
        """
        if route not in ("", "flat"):
            raise ValueError(
                f"decode.answer_route={route!r}; flat or empty, which is index.route"
            )
        index = dataclasses.replace(self.index, X=X or self.index.X)
        if route:
            index = dataclasses.replace(
                index, route=route, route_tokens=index.query_block, granularity="token"
            )
        tokens = temperature_tokens or self.temperature_tokens
        gain = temperature_gain or self.temperature_gain
        return dataclasses.replace(
            self, index=index, temperature_tokens=tokens, temperature_gain=gain
        )
