"""What a checkpoint says about its model, and what of that the decoder can be. Called by `checkpoint`."""

import dataclasses

from bsa.model import rope
from bsa.model import settings as model_settings

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model as it was trained.

    Attributes:
        layers: a letter for each layer: d dense, s sliding.
        sliding_tokens: reach of the sliding layers, the token itself included; 0 if there is none.
        max_tokens: longest text that it is said to read, in tokens.
    """

    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    L: int
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    tied: bool
    rope_theta: float
    rope_scaling: rope.Scaling
    layers: str
    sliding_tokens: int
    max_tokens: int

    def settings(self, model: model_settings.ModelSettings, pattern: str | None = None):
        """`model` with this architecture's sizes; attention is as trained unless there is a pattern.

        Args:
            model: gives what is a matter of choice: window, index, dtype.
            pattern: kinds of layers; all take positions as trained, and share the first window of `model`.
        Raises:
            ValueError: the pattern does not fit L layers.
        """
        pattern = shortest_pattern(self.layers if pattern is None else pattern)
        window = tuple(
            self.sliding_tokens if kind == "s" else model.window_tokens[0]
            for kind in pattern
        )
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(model_settings.ModelSettings)
            if hasattr(self, field.name)
        }
        return dataclasses.replace(
            model,
            **own,
            pattern=pattern,
            positions="r" * len(pattern),
            window_tokens=window,
        )

    def swapped(self, pattern: str, kept_layers: tuple[int, ...]) -> str:
        """A letter for each layer: the pattern's, repeated, but for layers that keep what they were trained with.

        Raises:
            ValueError: a layer that is to be kept does not exist.
        """
        if outside := [i for i in kept_layers if not 0 <= i < self.L]:
            raise ValueError(
                f"pretrained: kept_layers={tuple(outside)} are none of the layers 0 to {self.L - 1}"
            )
        letters = (pattern * self.L)[: self.L]
        return "".join(
            self.layers[i] if i in kept_layers else letters[i] for i in range(self.L)
        )


def shortest_pattern(layers: str) -> str:
    """The shortest string that gives `layers` when repeated: layers of one letter compile once."""
    lengths = range(1, len(layers) + 1)
    return next(
        layers[:n] for n in lengths if layers[:n] * (len(layers) // n) == layers
    )


def from_config(config: dict) -> Architecture:
    """Reads a Hugging Face config.json of one of `FAMILIES`.

    Raises:
        ValueError: the family is unknown, or the config asks for what the decoder lacks.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"pretrained: model_type={family!r} is unknown; the families are {', '.join(FAMILIES)}"
        )
    _refuse(config, "hidden_act", "silu")
    for bias in ("mlp_bias", "attention_bias"):
        _refuse(config, bias, False)
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _refuse(config | rotary, "partial_rotary_factor", 1.0)
    layers = _layers(config)
    heads = config["num_attention_heads"]
    return Architecture(
        D=config["hidden_size"],
        H=heads,
        G=config.get("num_key_value_heads") or heads,
        K=config.get("head_dim") or config["hidden_size"] // heads,
        F=config["intermediate_size"],
        V=config["vocab_size"],
        L=config["num_hidden_layers"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tied=config.get("tie_word_embeddings", False),
        rope_theta=rotary.get("rope_theta") or config.get("rope_theta", 10_000.0),
        rope_scaling=_scaling(rotary, config),
        layers=layers,
        sliding_tokens=config["sliding_window"] if "s" in layers else 0,
        max_tokens=config["max_position_embeddings"],
    )


def from_gguf(fields: dict, has_head: bool, frequency_factors) -> Architecture:
    """Reads the metadata of a GGUF file of architecture llama or qwen2.

    Args:
        fields: values by name.
        has_head: whether logits have a matrix of their own.
        frequency_factors: what each pair's frequency is divided by, or None; files of Llama 3.1 carry their scaling so.
    Raises:
        ValueError: the architecture is unknown, or asks for what the decoder lacks.
    """
    family = fields.get("general.architecture")
    if family not in ("llama", "qwen2"):
        raise ValueError(
            f"pretrained: GGUF architecture {family!r} is unknown; llama and qwen2 are read"
        )
    own = {
        name.removeprefix(f"{family}."): value
        for name, value in fields.items()
        if name.startswith(f"{family}.")
    }
    heads, width = own["attention.head_count"], own["embedding_length"]
    K = own.get("attention.key_length", width // heads)
    if own.get("rope.dimension_count", K) != K:
        raise ValueError(
            f"pretrained: positions turn {own['rope.dimension_count']} of K={K} channels; the decoder turns all"
        )
    rotary = {
        name.removeprefix("rope.scaling."): value
        for name, value in own.items()
        if name.startswith("rope.scaling.")
    }
    rotary["original_max_position_embeddings"] = rotary.get("original_context_length")
    if frequency_factors is not None:
        factors = tuple(map(float, frequency_factors))
        rotary = {"type": "longrope", "attention_factor": 1.0, "factor": 1.0}
        rotary |= {"short_factor": factors, "long_factor": factors}
    return Architecture(
        D=width,
        H=heads,
        G=own.get("attention.head_count_kv", heads),
        K=K,
        F=own["feed_forward_length"],
        V=len(fields["tokenizer.ggml.tokens"]),
        L=own["block_count"],
        norm_eps=own["attention.layer_norm_rms_epsilon"],
        qk_norm=False,
        qkv_bias=family == "qwen2",
        tied=not has_head,
        rope_theta=own.get("rope.freq_base", 10_000.0),
        rope_scaling=_scaling(
            rotary, {"max_position_embeddings": own["context_length"]}
        ),
        layers="d" * own["block_count"],
        sliding_tokens=0,
        max_tokens=own["context_length"],
    )


def _layers(config):
    """A letter for each layer. Qwen's layers slide only if told to, Mistral's if there is a window."""
    num, window = config["num_hidden_layers"], config.get("sliding_window")
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    if window is None or config["model_type"] == "llama":
        return "d" * num
    if kinds := config.get("layer_types"):
        return "".join("s" if kind == "sliding_attention" else "d" for kind in kinds)
    dense = 0 if config["model_type"] == "mistral" else config["max_window_layers"]
    return "d" * min(dense, num) + "s" * (num - dense)


def _scaling(rotary, config):
    """Scaling of positions from a config's `rope_scaling`; `config` gives the model's length."""
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if rotary.get("truncate") is False:
        raise ValueError("pretrained: YaRN without truncation is not supported")
    longest = config["max_position_embeddings"]
    trained = (
        rotary.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or longest
    )
    amplitude = rotary.get("attention_factor") or rotary.get("attn_factor") or 0.0
    factor = rotary.get("factor") or max(longest / trained, 1.0)
    both = rotary.get("mscale"), rotary.get("mscale_all_dim")
    if kind == "yarn" and all(both) and not amplitude:
        first, second = (rope.yarn_amplitude(factor**m) for m in both)
        amplitude = first / second
    is_llama3 = kind == "llama3"
    fast = rotary.get("high_freq_factor" if is_llama3 else "beta_fast")
    slow = rotary.get("low_freq_factor" if is_llama3 else "beta_slow")
    return rope.Scaling(
        kind="none" if kind == "default" else kind,
        factor=float(factor),
        trained_tokens=trained,
        tokens=0,
        amplitude=float(amplitude),
        fast_turns=float(fast or 32),
        slow_turns=float(slow or 1),
        short_factors=tuple(rotary.get("short_factor", ())),
        long_factors=tuple(rotary.get("long_factor", ())),
    )


def _refuse(config, name, only):
    """Raises unless a knob is absent or has the one value that the decoder knows."""
    value = config.get(name)
    if value is not None and value != only:
        raise ValueError(
            f"pretrained: {name}={value!r} is not supported; the decoder has {only!r}"
        )
