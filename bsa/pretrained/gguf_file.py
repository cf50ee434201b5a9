"""A GGUF file to metadata, dequantised tensors and a tokenizer. Called by `checkpoint`."""

import pathlib

import gguf
import numpy as np
import tokenizers
from gguf import quants
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

CONTROL = 3
"""Type of the tokens that no text turns into, such as the end of a document."""

SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Where byte-level vocabularies cut text before they merge bytes, as their tokenizer.json files have it."""


class GgufFile:
    """An opened file; tensors are dequantised when asked for, by the `gguf` package.

    Raises:
        ValueError: the file is no GGUF file, or ends too early.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"pretrained: {path} is no whole GGUF file: {error}"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = {name: field.contents() for name, field in reader.fields.items()}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that (Hugging Face) name."""
        return _own_name(name) in self._tensors

    def read(self, name: str) -> np.ndarray:
        """The tensor of that (Hugging Face) name, float32, rows of q and k in the order of Hugging Face.

        Raises:
            ValueError: it is missing, or of a type that the package does not dequantise.
        """
        if not self.has(name):
            raise ValueError(
                f"pretrained: {self._path} has no tensor {_own_name(name)} ({name})"
            )
        tensor = self._tensors[_own_name(name)]
        try:
            array = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"pretrained: tensor {tensor.name} of {self._path}: {error}"
            ) from error
        for part, heads in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if (
                part in name
                and (count := self.fields.get(f"llama.attention.{heads}")) is not None
            ):
                array = _by_halves(array, count)
        return array

    def frequency_factors(self) -> np.ndarray | None:
        """What the frequency of each rotary pair is divided by, if the file says."""
        tensor = self._tensors.get("rope_freqs.weight")
        return None if tensor is None else np.asarray(tensor.data)


def make_tokenizer(fields: dict) -> tokenizers.Tokenizer:
    """The byte-level tokenizer that the metadata describe.

    Raises:
        ValueError: the vocabulary is of another kind.
    """
    kind, pre = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", *SPLITS):
        raise ValueError(
            f"pretrained: the file's tokenizer ({kind}, {pre}) is not byte-level BPE of a known kind; "
            "put the model's tokenizer.json beside it"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    if pre in SPLITS:
        parts = [
            pre_tokenizers.Split(tokenizers.Regex(SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pre == "smollm":
            parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, types) if kind == CONTROL]
    )
    if fields.get("tokenizer.ggml.add_bos_token"):
        first = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return tokenizer


def _own_name(name):
    """GGUF's name of a tensor that Hugging Face calls `name`."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, what = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.{what}"


def _by_halves(rows, heads):
    """Undoes GGUF's order of llama's q and k: pairs (2i, 2i + 1) of a head become (i, i + K/2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
