"""Small checkpoints of every family and scaling, with weights that any machine makes alike. Used by tests and `references`."""

import json

import numpy as np
import safetensors.numpy

TOKENS = 40
BASE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.5, 4.0],
}
CASES = {
    "llama2": {"num_key_value_heads": 4},
    "llama3": {"rope_scaling": LLAMA3},
    "smollm2": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "mistral-dense": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn-mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
        }
    },
    "longrope-short": {
        "rope_scaling": LONGROPE | {"original_max_position_embeddings": 48}
    },
    "longrope-long": {
        "rope_scaling": LONGROPE | {"original_max_position_embeddings": 16}
    },
}


def config(name: str) -> dict:
    """The case's config.json."""
    return BASE | CASES[name]


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, BASE["vocab_size"], (1, TOKENS))


def tensors(config: dict) -> dict[str, np.ndarray]:
    """float32 weights by name, large enough that attention is far from uniform."""
    D, F, K = (
        config[name] for name in ("hidden_size", "intermediate_size", "head_dim")
    )
    H, G = config["num_attention_heads"] * K, config["num_key_value_heads"] * K
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (H, D),
            "self_attn.k_proj.weight": (G, D),
            "self_attn.v_proj.weight": (G, D),
            "self_attn.o_proj.weight": (D, H),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        if config["model_type"] == "qwen2":
            layer |= {"self_attn.q_proj.bias": (H,), "self_attn.k_proj.bias": (G,)}
            layer |= {"self_attn.v_proj.bias": (G,)}
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm.weight": (K,), "self_attn.k_norm.weight": (K,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) * 0.3 + name.endswith("norm.weight")).astype("f4")
        for name, shape in shapes.items()
    }


def write(config: dict, folder, num_shards: int = 1) -> None:
    """A folder as a hub has it: config.json and weights, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = tensors(config)
    if num_shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return
    names, files = sorted(weights), {}
    for i in range(num_shards):
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[i::num_shards]}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
