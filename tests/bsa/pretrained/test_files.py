"""GGUF files say the same as safetensors folders; what is wrong with either is said in one line."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st

from bsa.pretrained import checkpoint, gguf_file, parameters
from tests.bsa.pretrained import checkpoints

Type = gguf.GGMLQuantizationType
OWN_NAMES = gguf_file.NAMES | {
    f"model.layers.{i}.{name}.{what}": f"blk.{i}.{own}.{what}"
    for i in range(2)
    for name, own in gguf_file.LAYER_NAMES.items()
    for what in ("weight", "bias")
}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Rows of 256 weights, which is what the K types quantise together."""


def write_gguf(config, path, kind=Type.F32, left_out=(), factors=None):
    """The case's weights as llama.cpp's converter writes them: llama's rows of q and k by pairs."""
    family = "qwen2" if config["model_type"] == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    for name, array in checkpoints.tensors(config).items():
        if name in left_out:
            continue
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, count in heads.items():
            if part in name and family == "llama":
                halves = array.reshape(config[count], 2, -1, *array.shape[1:])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        own = OWN_NAMES[name]
        if array.ndim < 2 or kind is Type.F32:
            writer.add_tensor(own, array)
        else:
            writer.add_tensor(own, stored_as(kind, array), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_as(kind, array):
    """Quantised rows; for the types that the package only reads, random bytes with small scales."""
    try:
        return quants.quantize(array, kind)
    except NotImplementedError:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(array.size)
        raw = rng.integers(0, 256, (*array.shape[:-1], array.shape[-1] // 256, size))
        raw = raw.astype(np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        at = slice(-2, None) if kind is Type.Q6_K else slice(0, 4)
        raw[..., at] = np.tile(scale, 1 if kind is Type.Q6_K else 2)
        return raw.reshape(*array.shape[:-1], -1)


def flat(tree, name=""):
    if not isinstance(tree, dict):
        return {name: tree}
    return {
        k: v for n, part in tree.items() for k, v in flat(part, f"{name}/{n}").items()
    }


@pytest.mark.parametrize("name", ["llama2", "smollm2", "qwen2"])
def test_a_gguf_file_is_its_safetensors_folder(name, tmp_path):
    config = checkpoints.config(name)
    checkpoints.write(config, tmp_path / "folder", num_shards=3)
    write_gguf(config, tmp_path / "model.gguf")
    folder = checkpoint.open_checkpoint(str(tmp_path / "folder"))
    file = checkpoint.open_checkpoint(str(tmp_path / "model.gguf"))
    a, b = flat(parameters.load(folder)), flat(parameters.load(file))
    assert a.keys() == b.keys()
    for leaf in a:
        np.testing.assert_array_equal(a[leaf], b[leaf], err_msg=leaf)
    same = ("D", "H", "G", "K", "F", "V", "L", "tied", "qkv_bias", "layers")
    for letter in same:
        assert getattr(folder.architecture, letter) == getattr(
            file.architecture, letter
        )
    assert np.isclose(folder.architecture.norm_eps, file.architecture.norm_eps)


@pytest.mark.parametrize(
    "kind",
    [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.F16, Type.F32],
    ids=lambda kind: kind.name,
)
def test_tensors_are_what_the_package_dequantises(kind, tmp_path):
    config = checkpoints.config("llama3") | WIDE
    write_gguf(config, tmp_path / "model.gguf", kind)
    read = checkpoint.open_checkpoint(str(tmp_path / "model.gguf")).read
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"):
        own = stored[OWN_NAMES[f"model.layers.1.{name}.weight"]]
        expected = quants.dequantize(own.data, own.tensor_type)
        if "attn" in name:
            # Channel 2i + j of a head is half j's i-th.
            heads = config[
                "num_attention_heads" if "q_" in name else "num_key_value_heads"
            ]
            order = np.arange(64).reshape(32, 2).T.ravel()
            expected = expected.reshape(heads, 64, -1)[:, order].reshape(expected.shape)
        found = read(f"model.layers.1.{name}.weight")
        assert (
            found.dtype == np.float32 and np.isfinite(found).all() and found.std() > 0
        )
        np.testing.assert_array_equal(found, expected)


def test_frequency_factors_of_a_gguf_file_are_honoured(tmp_path):
    write_gguf(checkpoints.config("llama2"), tmp_path / "m.gguf", factors=[1, 2, 3, 4])
    scaling = checkpoint.open_checkpoint(
        str(tmp_path / "m.gguf")
    ).architecture.rope_scaling
    assert (scaling.kind, scaling.amplitude) == ("longrope", 1.0)
    assert scaling.long_factors == scaling.short_factors == (1.0, 2.0, 3.0, 4.0)


def test_half_precision_weights_are_widened(tmp_path):
    config = checkpoints.config("smollm2")
    checkpoints.write(config, tmp_path)
    weights = checkpoints.tensors(config)
    narrow = {name: jnp.asarray(x, jnp.bfloat16) for name, x in weights.items()}
    safetensors.flax.save_file(narrow, tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    found = checkpoint.open_checkpoint(str(tmp_path)).read(name)
    np.testing.assert_array_equal(found, narrow[name].astype(jnp.float32))


def broken(tmp_path, name="llama2", num_shards=2, **changes):
    checkpoints.write(checkpoints.config(name) | changes, tmp_path, num_shards)
    return lambda: parameters.load(checkpoint.open_checkpoint(str(tmp_path)))


def test_a_missing_shard_names_a_tensor(tmp_path):
    load = broken(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"tensor model\.\S+ cannot be read from .*00002-of"
    ):
        load()


def test_a_corrupt_shard_names_a_tensor(tmp_path):
    load = broken(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"tensor model\.\S+ cannot be read from .*00001-of"
    ):
        load()


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    load = broken(tmp_path)
    config = checkpoints.config("llama2") | {"intermediate_size": 47}
    (tmp_path / "config.json").write_text(checkpoints.json.dumps(config))
    message = r"mlp\.gate_proj\.weight has shape \(48, 32\), but the config promises \(47, 32\)"
    with pytest.raises(ValueError, match=message):
        load()


def test_a_missing_tensor_is_named(tmp_path):
    lost = "model.layers.1.mlp.up_proj.weight"
    write_gguf(checkpoints.config("llama2"), tmp_path / "m.gguf", left_out=[lost])
    opened = checkpoint.open_checkpoint(str(tmp_path / "m.gguf"))
    with pytest.raises(
        ValueError, match=r"no tensor blk\.1\.ffn_up\.weight \(model\.layers"
    ):
        parameters.load(opened)


def test_a_file_that_ends_too_early_is_no_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(checkpoints.config("llama2"), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"m\.gguf is no whole GGUF file"):
        checkpoint.open_checkpoint(str(path))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "gpt_neox"},
            "model_type='gpt_neox' is unknown; the families are",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"rope_scaling": {"rope_type": "su"}}, "kind='su' is not one of"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_what_the_decoder_lacks_is_said(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        broken(tmp_path, num_shards=1, **changes)()


def test_a_config_that_says_too_little_is_an_error(tmp_path):
    config = checkpoints.config("llama2")
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(checkpoints.json.dumps(config))
    with pytest.raises(ValueError, match="does not say 'hidden_size'"):
        checkpoint.open_checkpoint(str(tmp_path))


def test_a_tokenizer_that_is_missing_or_corrupt_is_an_error(tmp_path):
    checkpoints.write(checkpoints.config("llama2"), tmp_path)
    opened = checkpoint.open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        opened.tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        opened.tokenizer()


def test_a_source_that_is_none_says_what_would_be():
    with pytest.raises(ValueError, match="no folder with a config.json, no .gguf file"):
        checkpoint.open_checkpoint("nowhere/at/all")


def byte_level(pre):
    """Metadata of a vocabulary of all bytes, two merges and an end."""
    bytes_ = sorted(gguf_file.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *bytes_, "th", "the"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.token_type": [gguf_file.CONTROL] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.bos_token_id": 0,
    }


TOKENIZERS = {
    pre: gguf_file.make_tokenizer(byte_level(pre))
    for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2")
}


@given(text=st.text(), pre=st.sampled_from(["smollm", "gpt-2", "llama-bpe"]))
def test_text_comes_back_from_its_tokens(text, pre):
    ids = TOKENIZERS[pre].encode(text + "the").ids
    assert TOKENIZERS[pre].decode(ids) == text + "the"


@pytest.mark.parametrize(
    "pre, parts",
    [
        ("smollm", ["Ġ", "1", "2", "3", "4"]),
        ("gpt-2", ["Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4"]),
    ],
)
def test_merges_and_special_tokens(pre, parts):
    tokenizer = TOKENIZERS[pre]
    assert tokenizer.encode("the 1234<|end|>").tokens == ["the", *parts, "<|end|>"]
    with_first = byte_level(pre) | {"tokenizer.ggml.add_bos_token": True}
    assert gguf_file.make_tokenizer(with_first).encode("the").tokens == [
        "<|end|>",
        "the",
    ]


def test_an_unknown_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="put the model's tokenizer.json beside it"):
        gguf_file.make_tokenizer(
            byte_level("gpt-2") | {"tokenizer.ggml.model": "llama"}
        )
