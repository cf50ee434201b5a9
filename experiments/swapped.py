"""A pretrained model with its attention swapped: nats per token over the second half of a text. Called by experiments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import local, metrics
from bsa.model import attention, decoder
from bsa.model import settings as model_settings
from bsa.pretrained import checkpoint, parameters
from bsa.train import loss, settings
from configs import base
from experiments import texts

CHARACTERS_PER_TOKEN = 8
"""More than any of the texts has, so that enough of it is tokenised."""


@dataclasses.dataclass(frozen=True)
class Swap:
    """What every layer's attention becomes.

    Attributes:
        kind: a letter of the decoder's pattern, or one for each layer.
        window_tokens: of window and bookmark layers.
        per_head: whether each query head chooses for itself, as if it had a key/value head of its own.
        index: knobs of the index that differ from `configs/base.py`, as (name, value).
        stretch: a kind of `rope.Scaling`, for texts longer than those that the model was trained on, by as much as they
            are longer, or by so many times that ("ntk:2"); "" as trained.
    """

    kind: str
    window_tokens: int = 256
    per_head: bool = False
    index: tuple[tuple[str, object], ...] = ()
    stretch: str = ""

    def local_tokens(self) -> float:
        """Tokens read without a choice, mean over a block's tokens: sinks and a window of whole blocks."""
        index = dict(self.index)
        return index["sink_tokens"] + self.window_tokens - (index["C"] - 1) / 2


class Model:
    """A checkpoint, loaded once; compiled for each swap."""

    def __init__(self, opened: checkpoint.Checkpoint):
        self._opened = opened
        self.loaded = parameters.load(opened)
        config = base.get_config()
        config.model.update(dtype="float32", remat="none")
        self._model = settings.from_config(config).model

    def tokens(self, text: str, num_tokens: int) -> np.ndarray:
        """int32: the first `num_tokens` of a text of `texts`, and the one after them."""
        start = texts.read(text)[: num_tokens * CHARACTERS_PER_TOKEN]
        ids = self._opened.tokenizer().encode(start).ids[: num_tokens + 1]
        if len(ids) <= num_tokens:
            raise ValueError(
                f"{text} has {len(ids)} tokens here, but {num_tokens + 1} are wanted"
            )
        return np.array(ids, np.int32)

    def settings(self, swap: Swap, num_tokens: int) -> model_settings.ModelSettings:
        """The decoder's settings under a swap, for texts of a length."""
        model = dataclasses.replace(
            self._model,
            window_tokens=(swap.window_tokens,) * len(self._model.pattern),
            index=dataclasses.replace(self._model.index, **dict(swap.index)),
        )
        shape = self._opened.architecture
        model = shape.settings(model, (swap.kind * shape.L)[: shape.L])
        scaling = dataclasses.replace(model.rope_scaling, tokens=num_tokens)
        if swap.stretch:
            kind, _, times = swap.stretch.partition(":")
            scaling = dataclasses.replace(
                scaling,
                kind=kind,
                trained_tokens=shape.max_tokens,
                factor=max(num_tokens / shape.max_tokens, 1.0) * float(times or 1),
            )
            if kind == "dynamic":  # which grows by the text's length itself
                scaling = dataclasses.replace(scaling, factor=1.0)
        model = dataclasses.replace(model, rope_scaling=scaling)
        return dataclasses.replace(model, G=model.H) if swap.per_head else model

    def measure(self, token_T: np.ndarray, swap: Swap, answer_tokens: int = 0) -> dict:
        """Reads a text once; figures are means over layers, heads and the second half of its positions.

        Args:
            token_T: T + 1 tokens.
            answer_tokens: how many of the last ones are an answer.
        Returns:
            `nats` a token; `found`, 1 if the answer's tokens are all the likeliest, else 0; `attended_tokens` a query;
            for bookmark layers also `union_tokens` of a query block, `scored_nodes` of a token, and `refused_choices`
            of a query block (over all positions).
        """
        model = self.settings(swap, len(token_T) - 1)
        params = parameters.arrange(self.loaded, model.pattern)
        if swap.per_head:
            params = _heads_of_their_own(params, model)
        with jax.default_matmul_precision("highest"):
            found = _measure(params, jnp.asarray(token_T)[None], model, answer_tokens)
        return {name: float(value) for name, value in found.items()}

    def measure_layers(
        self, token_T: np.ndarray, swap: Swap, choices: tuple[int, ...]
    ) -> dict:
        """`measure` of bookmark layers each of which chooses so many blocks a token; compiled once for each number.

        Args:
            swap: its index's `A` is not read.
            choices: as many numbers as layers.
        """
        T = len(token_T) - 1
        model, token_BT = self.settings(swap, T), jnp.asarray(token_T)[None]
        params = parameters.arrange(self.loaded, model.pattern)
        position_BT = jnp.arange(T, dtype=jnp.int32)[None]
        models = [
            dataclasses.replace(model, index=dataclasses.replace(model.index, A=num))
            for num in choices
        ]
        attends = [functools.partial(_attend, own=own) for own in models]
        with jax.default_matmul_precision("highest"):
            hidden_BTD, layers = decoder.apply_layers(
                params, token_BT[:, :-1], position_BT, model, attends
            )
            nll_BT, _ = loss.cross_entropy(
                hidden_BTD[:, T // 2 :],
                decoder.head(params),
                token_BT[:, T // 2 + 1 :],
                512,
            )
        figures = [
            _figures(jax.tree.map(lambda x: x[None], layer), position_BT, own, 0)
            for layer, own in zip(layers, models)
        ]
        means = jax.tree.map(lambda *values: float(np.mean(values)), *figures)
        return {"nats": float(nll_BT.mean())} | means


def _attend(heads, _, position_BT, model, letter, followed, *, own):
    """`attention.attend` by a layer's own settings, for one document a row."""
    del model, followed
    return _attend_compiled(heads, position_BT, own, letter)


@functools.partial(jax.jit, static_argnames=("model", "letter"))
def _attend_compiled(heads, position_BT, model, letter):
    segment_BT = jnp.ones_like(position_BT)
    return attention.attend(heads, segment_BT, position_BT, model, letter)


@functools.partial(jax.jit, static_argnames=("model", "answer_tokens"))
def _measure(params, token_BT, model, answer_tokens):
    T = token_BT.shape[1] - 1
    half = T // 2
    position_BT = jnp.arange(T, dtype=jnp.int32)[None]
    hidden_BTD, figures = decoder.apply(
        params, token_BT[:, :-1], jnp.ones_like(position_BT), position_BT, model
    )
    nll_BT, hit_BT = loss.cross_entropy(
        hidden_BTD[:, half:], decoder.head(params), token_BT[:, half + 1 :], 512
    )
    values = {"nats": [nll_BT.mean()]}
    if answer_tokens:
        values["found"] = [hit_BT[0, -answer_tokens:].all()]
    for layer, found in figures.items():
        letter = int(layer.partition("_")[0])
        for name, value in _figures(found, position_BT, model, letter).items():
            values.setdefault(name, []).append(value)
    return {name: jnp.stack(value).mean() for name, value in values.items()}


def _figures(layer, position_BT, model, letter):
    """Of one letter's layers, in the second half of the positions."""
    half = position_BT.shape[1] // 2
    kind, index = model.pattern[letter], model.index
    if kind == "f":
        return {}
    if kind == "b":
        lists = layer["selection"]
        attended_LBT = jax.lax.map(
            lambda part: metrics.attended_tokens(part, jnp.zeros_like(position_BT)),
            lists,
        )
        count_LBGQ = lists.count_BGQ[..., half // lists.query_block :]
        return {
            "attended_tokens": attended_LBT[..., half:].mean(),
            "union_tokens": count_LBGQ.mean() * lists.key_block,
            "scored_nodes": layer["scored_nodes"][..., half:].mean(),
            "refused_choices": layer["refused_choices"].mean(),
        }
    read_BT = position_BT + 1
    if kind == "s":
        read_BT = jnp.minimum(read_BT, model.window_tokens[letter])
    if kind == "w":
        view = local.window(
            position_BT,
            window_tokens=model.window_tokens[letter],
            sink_tokens=index.sink_tokens,
            key_block=index.C,
        )
        window_BT = read_BT - view.low_BT * index.C
        read_BT = jnp.minimum(read_BT, window_BT + index.sink_tokens)
    return {"attended_tokens": read_BT[:, half:].mean()}


def _heads_of_their_own(params, model):
    """Keys and values once for each query head: lists are then one a query head, and outputs what they were."""
    [(name, layer)] = params["groups"].items()
    attention = dict(layer["attention"])
    for part in ("key_DGK", "value_DGK"):
        times = model.H // attention[part].shape[-2]
        attention[part] = np.repeat(attention[part], times, axis=-2)
    return params | {"groups": {name: layer | {"attention": attention}}}
