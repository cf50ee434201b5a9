"""Tensors of a checkpoint to the decoder's parameters. Called by `bsa.main` and experiments."""

import math

import numpy as np

from bsa.pretrained import checkpoint as checkpoints

LAYER = {
    ("attention_norm", "scale_D"): ("input_layernorm.weight", "D"),
    ("attention", "query_DHK"): ("self_attn.q_proj.weight", "HK D"),
    ("attention", "key_DGK"): ("self_attn.k_proj.weight", "GK D"),
    ("attention", "value_DGK"): ("self_attn.v_proj.weight", "GK D"),
    ("attention", "out_HKD"): ("self_attn.o_proj.weight", "D HK"),
    ("mlp_norm", "scale_D"): ("post_attention_layernorm.weight", "D"),
    ("mlp", "gate_DF"): ("mlp.gate_proj.weight", "F D"),
    ("mlp", "up_DF"): ("mlp.up_proj.weight", "F D"),
    ("mlp", "down_FD"): ("mlp.down_proj.weight", "D F"),
}
"""Where a layer's parameter stands in the decoder: its name in the checkpoint, and the axes of that tensor."""

BIASES = {
    ("attention", "query_HK"): ("self_attn.q_proj.bias", "HK"),
    ("attention", "key_GK"): ("self_attn.k_proj.bias", "GK"),
    ("attention", "value_GK"): ("self_attn.v_proj.bias", "GK"),
}
QK_NORMS = {
    ("attention", "query_norm", "scale_K"): ("self_attn.q_norm.weight", "K"),
    ("attention", "key_norm", "scale_K"): ("self_attn.k_norm.weight", "K"),
}


def load(checkpoint: checkpoints.Checkpoint) -> dict:
    """Reads every tensor that the decoder needs, in float32.

    Returns:
        `embedding_VD`, `head_VD` if untied, `final_norm`, and `layers`: a layer's tree with a leading axis L. See `arrange`.
    Raises:
        ValueError: a tensor is missing, unreadable, or of the wrong shape; the message names it.
    """
    shape = checkpoint.architecture
    table = LAYER | (BIASES if shape.qkv_bias else {})
    table |= QK_NORMS if shape.qk_norm else {}

    def read(name, stored, path):
        return _read(checkpoint, name, stored, path[-1].rpartition("_")[2])

    layers = {}
    for path, (name, stored) in table.items():
        parts = (read(f"model.layers.{i}.{name}", stored, path) for i in range(shape.L))
        _put(layers, path, np.stack(list(parts)))
    top = {("embedding_VD",): "model.embed_tokens.weight"}
    if not shape.tied:
        top["head_VD",] = "lm_head.weight"
    params = {path[0]: read(name, "V D", path) for path, name in top.items()}
    scale_D = read("model.norm.weight", "D", ("scale_D",))
    return params | {"final_norm": {"scale_D": scale_D}, "layers": layers}


def arrange(params: dict, pattern: str) -> dict:
    """Parameters as the decoder has them, for any pattern whose length divides L: swapping attention moves no weight."""
    step = len(pattern)
    groups = {
        f"layer_{i}_{kind}": _map(lambda x, i=i: x[i::step], params["layers"])
        for i, kind in enumerate(pattern)
    }
    rest = {name: part for name, part in params.items() if name != "layers"}
    return rest | {"groups": groups}


def _read(checkpoint, name, stored, wanted):
    """A tensor of axes `stored`, joined ones without a space between, as one of axes `wanted`."""
    array = checkpoint.read(name)
    sizes = [
        [getattr(checkpoint.architecture, letter) for letter in joined]
        for joined in stored.split()
    ]
    expected = tuple(math.prod(joined) for joined in sizes)
    if array.shape != expected:
        raise ValueError(
            f"pretrained: tensor {name} has shape {array.shape}, but the config promises {expected}"
        )
    split = array.reshape([size for joined in sizes for size in joined])
    return np.einsum(f"{stored.replace(' ', '')}->{wanted}", split)


def _put(tree, path, leaf):
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _map(function, tree):
    if isinstance(tree, dict):
        return {name: _map(function, part) for name, part in tree.items()}
    return function(tree)
