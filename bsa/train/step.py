"""The compiled steps: one of training, one of evaluation. The only place in training that calls `jax.jit`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsa.model import decoder
from bsa.model import settings as model_settings
from bsa.parallel import mesh as meshes
from bsa.tasks import settings as data_settings
from bsa.train import loss, optimizer, settings


class TrainState(NamedTuple):
    """What learning changes."""

    step: jax.Array
    params: Any
    optimizer_state: optax.OptState


def abstract_state(run: settings.RunSettings, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, without making one."""
    state = jax.eval_shape(lambda: _fresh_state(run))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        state,
        meshes.state_sharding(mesh, state),
    )


def initial_state(run: settings.RunSettings, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh state, each part made where it belongs."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, mesh))
    return jax.jit(lambda: _fresh_state(run), out_shardings=shardings)()


def check(run: settings.RunSettings, mesh: jax.sharding.Mesh) -> None:
    """Traces the model on the shapes of each stage's batch, so that sizes that do not fit are found before anything is written.

    Raises:
        ValueError: they do not fit; the message says which.
    """
    stages = [(data.B, data.T) for _, data in data_settings.stages(run.data)]
    for rows in (*(B for B, _ in stages), run.evaluation.passkey_samples):
        meshes.check_rows(mesh, rows)
    tensor = mesh.shape["tensor"]
    if run.model.G % tensor:
        raise ValueError(f"G={run.model.G} heads do not divide over tensor={tensor}")
    names = ("token_BT", "target_BT", "segment_id_BT", "position_BT")
    params = abstract_state(run, mesh).params
    for shape in stages:
        rows = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
        for model in {run.model, run.start_model}:
            reading = dataclasses.replace(run, model=model)
            forward = functools.partial(_forward, run=reading, mesh=mesh)
            jax.eval_shape(forward, params, rows)


def make_train_steps(run: settings.RunSettings, mesh: jax.sharding.Mesh):
    """Returns number -> the step with that number, from 1: those up to `train.start_steps` read by the start's pattern."""
    ordinary = make_train_step(run, mesh)
    if not run.train.start_steps:
        return lambda number: ordinary
    first = make_train_step(run, mesh, model=run.start_model)
    return lambda number: first if number <= run.train.start_steps else ordinary


def make_train_step(
    run: settings.RunSettings,
    mesh: jax.sharding.Mesh,
    *,
    model: model_settings.ModelSettings | None = None,
):
    """Compiles (state, batch) -> (state, figures); the state's memory is reused.

    The loss is the mean over the whole batch's weights, so that micro-batches give the same gradient as one batch. To what
    is minimised, not to the loss reported, `teach_weight` adds the layers' `selection_divergence` and `span_weight` their
    `span_ratio`, means of each micro-batch and layer. Noise on scores depends on the run's seed and on the step; micro-batches share it.
    Figures are float32 scalars: `loss` (nats a token), `bits_per_byte`, `gradient_norm`, `learning_rate`, and those of
    the attention layers.

    Args:
        model: how layers read, where that differs from `run.model`; parameters keep the names of `run.model`.
    """
    reading = dataclasses.replace(run, model=model or run.model)
    transform = optimizer.make_optimizer(run.train)
    schedule = optimizer.learning_rate(run.train)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, mesh))

    def train_step(state, batch):
        total = jnp.maximum(batch["weight_BT"].sum(), 1)
        noise_key = None
        if reading.model.score_noise:
            noise_key = jax.random.fold_in(jax.random.key(run.seed), state.step)

        def share_of_loss(params, part):
            nll_BT, _, figures = _forward(params, part, reading, mesh, noise_key)
            nats = (nll_BT * part["weight_BT"]).sum() / total
            figures["loss"] = nats * run.train.accumulation_steps
            for name, weight in (
                ("selection_divergence", run.train.teach_weight),
                ("span_ratio", run.train.span_weight),
            ):
                if weight and name in figures:
                    nats += figures[name] * weight / run.train.accumulation_steps
            return nats, figures

        _, figures, gradient = _accumulate(
            jax.value_and_grad(share_of_loss, has_aux=True),
            state.params,
            batch,
            run.train.accumulation_steps,
        )
        with jax.named_scope("optimizer"):
            updates, optimizer_state = transform.update(
                gradient, state.optimizer_state, state.params
            )
        figures |= {
            "bits_per_byte": figures["loss"] / jnp.log(2.0),
            "gradient_norm": optax.global_norm(gradient),
            "learning_rate": schedule(state.step),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state), figures

    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(shardings, meshes.whole(mesh))
    )


def make_evaluation_step(
    run: settings.RunSettings, mesh: jax.sharding.Mesh, bucket_start: tuple[int, ...]
):
    """Compiles (params, batch) -> sums and shares that are the same on every process.

    Args:
        bucket_start: first position of each bucket, ascending from 0.
    Returns:
        A function to a dict: `nats` and `tokens`, float32 sums over each bucket's weighted targets; `found`, the share
        of rows whose weighted targets are all the likeliest token; and the attention layers' figures.
    """
    edges = jnp.asarray(bucket_start)

    def evaluation_step(params, batch):
        nll_BT, hit_BT, figures = _forward(params, batch, run, mesh)
        weight_BT = batch["weight_BT"]
        bucket_BT = jnp.searchsorted(edges, batch["position_BT"], side="right") - 1

        def by_bucket(value_BT):
            return jax.ops.segment_sum(
                value_BT.ravel(), bucket_BT.ravel(), len(bucket_start)
            )

        found_B = (hit_BT | (weight_BT == 0)).all(1)
        return figures | {
            "nats": by_bucket(nll_BT * weight_BT),
            "tokens": by_bucket(weight_BT),
            "found": found_B.mean(),
        }

    return jax.jit(evaluation_step, out_shardings=meshes.whole(mesh))


def make_answer_step(run: settings.RunSettings, mesh: jax.sharding.Mesh):
    """Compiles (params, batch) -> hit_BT, bool, whether each target was the likeliest token; and the layers' figures."""

    def answer_step(params, batch):
        _, hit_BT, figures = _forward(params, batch, run, mesh)
        return hit_BT, figures

    return jax.jit(answer_step, out_shardings=meshes.whole(mesh))


def make_selection_step(run: settings.RunSettings, mesh: jax.sharding.Mesh):
    """Compiles (params, batch) -> the `BlockSelection` of every bookmark layer, by letter of the pattern."""

    def selections(params, batch):
        _, figures = _decode(params, batch, run, mesh)
        return {
            name: layer["selection"]
            for name, layer in figures.items()
            if "selection" in layer
        }

    return jax.jit(selections, out_shardings=meshes.whole(mesh))


def _fresh_state(run):
    params = decoder.init(jax.random.key(run.seed), run.model)
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.make_optimizer(run.train).init(params),
    )


def _decode(params, batch, run, mesh, noise_key=None):
    return decoder.apply(
        decoder.renamed(params, run.model.pattern),
        batch["token_BT"],
        batch["segment_id_BT"],
        batch["position_BT"],
        run.model,
        meshes.place(run.mesh, mesh),
        noise_key,
    )


def _forward(params, batch, run, mesh, noise_key=None):
    """Losses, hits and the layers' figures averaged over layers."""
    hidden_BTD, layers = _decode(params, batch, run, mesh, noise_key)
    nll_BT, hit_BT = loss.cross_entropy(
        hidden_BTD,
        decoder.head(params),
        batch["target_BT"],
        run.train.loss_chunk_tokens,
        meshes.place(run.mesh, mesh),
    )
    return nll_BT, hit_BT, _mean_figures(layers, batch["position_BT"])


def _mean_figures(layers, position_BT):
    """Means over the layers that report a figure; attended tokens also as a share of what dense attention reads."""
    values = {}
    for layer in layers.values():
        for name, value in layer.items():
            if name != "selection":
                values.setdefault(name, []).append(value.mean())
    figures = {name: jnp.stack(value).mean() for name, value in values.items()}
    return figures | {
        "attended_share": figures["attended_tokens"] / (position_BT.mean() + 1)
    }


def _accumulate(gradient_of, params, batch, parts):
    """Sums what is minimised and its gradient, and averages figures, over `parts` micro-batches of interleaved rows."""
    if parts == 1:
        (value, figures), gradient = gradient_of(params, batch)
        return value, figures, gradient
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total, part):
        (value, figures), gradient = gradient_of(params, part)
        return jax.tree.map(jnp.add, total, (value, figures, gradient)), None

    first = jax.tree.map(lambda x: x[0], batch)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient_of, params, first),
    )
    (value, figures), gradient = zero
    (value, figures, gradient), _ = jax.lax.scan(add, (value, figures, gradient), batch)
    return value, jax.tree.map(lambda x: x / parts, figures), gradient
