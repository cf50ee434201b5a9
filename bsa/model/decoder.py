"""Tokens to hidden states: the whole decoder, layers scanned. Called by `bsa.train`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsa.model import attention, layers, settings
from bsa.parallel import mesh
from pallas_kernels import shapes


class Decoder(nn.Module):
    """A decoder-only language model; layers follow the pattern, repeated."""

    model: settings.ModelSettings
    placement: mesh.Placement = mesh.ALONE

    @nn.compact
    def __call__(self, token_BT, segment_id_BT, position_BT):
        m = self.model
        init = nn.initializers.normal(layers.INITIAL_STD)
        embedding_VD = self.param("embedding_VD", init, (m.V, m.D))
        if not m.tied:
            self.param("head_VD", init, (m.V, m.D))
        # Looked up in float32: the gradient's scatter-add to few rows would crawl in bfloat16.
        x_BTD = embedding_VD[token_BT].astype(m.dtype)
        x_BTD = self.placement.constrain(x_BTD, "BTD")
        scanned = nn.scan(
            Group,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "noise": True},
            in_axes=nn.broadcast,
            length=m.L // len(m.pattern),
        )
        x_BTD, figures = scanned(m, self.placement, name="groups")(
            x_BTD, segment_id_BT, position_BT
        )
        return layers.Norm(m.norm_eps, name="final_norm")(x_BTD), figures


class Group(nn.Module):
    """One repetition of the pattern: a layer for each letter."""

    model: settings.ModelSettings
    placement: mesh.Placement = mesh.ALONE

    @nn.compact
    def __call__(self, x_BTD, segment_id_BT, position_BT):
        layer = layers.Layer
        if self.model.remat != "none":
            layer = nn.remat(layer, policy=_saved(self.model.remat), prevent_cse=False)
        attend = functools.partial(attention.attend, placement=self.placement)
        figures, followed = {}, None
        for i, kind in enumerate(self.model.pattern):
            name = f"{i}_{kind}"
            x_BTD, figures[name] = layer(
                self.model, i, attend, self.placement, name=f"layer_{name}"
            )(x_BTD, segment_id_BT, position_BT, followed if kind == "f" else None)
            x_BTD = self.placement.constrain(x_BTD, "BTD")
            followed = figures[name].pop(attention.FOLLOWED, followed)
        return x_BTD, figures


def _saved(remat):
    """What backward keeps: always the lists of key blocks; matrix products, or layers' inputs on the host, if asked."""
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[attention.SAVED],
            names_which_can_be_offloaded=[layers.LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    lists = policies.save_only_these_names(attention.SAVED)
    if remat == "layer":
        return lists
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, lists
    )


def init(key, model: settings.ModelSettings):
    """Fresh float32 parameters: a dict of arrays whose names end in their axes (scanned ones have a leading one more)."""
    tokens = jnp.zeros((1, max(model.index.C, model.index.query_block)), jnp.int32)
    return Decoder(model).init(key, tokens, tokens, tokens)["params"]


def apply(
    params,
    token_BT,
    segment_id_BT,
    position_BT,
    model: settings.ModelSettings,
    placement: mesh.Placement = mesh.ALONE,
    noise_key=None,
):
    """Runs the decoder; pure.

    Args:
        params: as `init` makes them.
        token_BT: int32 in [0, V).
        segment_id_BT: int32, documents of a packed row, equal within one; no attention crosses them.
        position_BT: int32, tokens since the beginning of the document.
        placement: devices that rows and tokens are split over.
        noise_key: of the noise on scores that `score_noise` asks for; None: scores are as they are.
    Returns:
        hidden_BTD in the model's dtype, to be multiplied by `head` for logits, and figures: a dict
        with one entry for each letter of the pattern ("3_b"), see `attention.attend`; each leaf has a leading axis of
        the pattern's repetitions.
    """
    shapes.check(
        token_BT=token_BT, segment_id_BT=segment_id_BT, position_BT=position_BT
    )
    rngs = {} if noise_key is None else {"noise": noise_key}
    return Decoder(model, placement).apply(
        {"params": params}, token_BT, segment_id_BT, position_BT, rngs=rngs
    )


def renamed(params, pattern: str):
    """The same parameters under the names that a pattern of as many letters gives them; all kinds of layers have the same."""
    groups = {}
    for name, layer in params["groups"].items():
        place = name.split("_")[1]
        groups[f"layer_{place}_{pattern[int(place)]}"] = layer
    return params | {"groups": groups}


def apply_layers(params, token_BT, position_BT, model: settings.ModelSettings, attends):
    """`apply` to tokens of one document a row, with each layer's attention given; layers are not scanned. Pure.

    Args:
        attends: for each of the L layers a function with the signature of `attention.attend`, for those who keep keys
            and values; it gets no segments, and the dict that it returns beside its output is handed on.
    Returns:
        hidden_BTD, and a list of what the layers' attention handed on.
    """
    shapes.check(token_BT=token_BT, position_BT=position_BT)

    def apply(layer, letter, own, x_BTD, followed):
        return apply_layer(
            own, x_BTD, position_BT, model, letter, attends[layer], followed
        )

    x_BTD, handed = through_layers(params, embed(params, token_BT, model), model, apply)
    return finish(params, x_BTD, model), handed


def embed(params, token_BT, model: settings.ModelSettings):
    """x_BTD that goes into the first layer."""
    return params["embedding_VD"][token_BT].astype(model.dtype)


def through_layers(params, x_BTD, model: settings.ModelSettings, apply):
    """x_BTD after the last layer, and a list of what the layers' attention handed on.

    Args:
        apply: called with a layer's number, its letter's place in the pattern, its parameters for `apply_layer`, x_BTD and
            what it follows; returns x_BTD after it, and what its attention handed on.
    """
    shapes.check(x_BTD=x_BTD)
    handed, followed = [], None
    for layer in range(model.L):
        repetition, letter = divmod(layer, len(model.pattern))
        kind = model.pattern[letter]
        own = params["groups"][f"layer_{letter}_{kind}"], repetition
        x_BTD, more = apply(
            layer, letter, own, x_BTD, followed if kind == "f" else None
        )
        handed.append(more)
        followed = more.pop(attention.FOLLOWED, followed)
    return x_BTD, handed


def apply_layer(
    own,
    x_BTD,
    position_BT,
    model: settings.ModelSettings,
    letter: int,
    attend,
    followed: attention.Followed | None = None,
):
    """x_BTD after one layer of one document a row, and what its attention handed on.

    Args:
        own: parameters of all layers of this letter, stacked, and which of them are the layer's.
        attend: as in `apply_layers`.
    """
    shapes.check(x_BTD=x_BTD, position_BT=position_BT)
    stacked, repetition = own
    params = jax.tree.map(lambda x: x[repetition], stacked)
    return layers.Layer(model, letter, attend).apply(
        {"params": params}, x_BTD, None, position_BT, followed
    )


def finish(params, x_BTD, model: settings.ModelSettings):
    """hidden_BTD, from what the last layer leaves."""
    norm = layers.Norm(model.norm_eps)
    return norm.apply({"params": params["final_norm"]}, x_BTD)


def head(params):
    """What hidden states are multiplied with for logits: head_VD, or the embeddings of a model that ties them."""
    return params.get("head_VD", params["embedding_VD"])


def queries_and_keys(
    params, token_BT, segment_id_BT, position_BT, model: settings.ModelSettings
):
    """What the attention layers compare, for those who study an index on a model's own keys; pure.

    Returns:
        A dict with one entry for each letter of the pattern ("3_b"): q_BTHK and k_BSGK as attention gets them, each
        with a leading axis of the pattern's repetitions.
    """
    _, variables = Decoder(model).apply(
        {"params": params},
        token_BT,
        segment_id_BT,
        position_BT,
        mutable=["intermediates"],
    )
    return {
        name.removeprefix("layer_"): (
            layer["attention"]["query"][0],
            layer["attention"]["key"][0],
        )
        for name, layer in variables["intermediates"]["groups"].items()
    }
