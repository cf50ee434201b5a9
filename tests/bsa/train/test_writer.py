"""Metrics: valid JSON lines that go on exactly where a resumed run goes on."""

import json

import jax
import jax.numpy as jnp
import pytest
from tensorboardX import proto

from bsa.train import writer


def write_steps(workdir, start_step, steps):
    with writer.MetricsWriter(workdir, start_step) as metrics:
        for step in steps:
            metrics.write(
                step, {"loss_nats": step / 4, "train/rows": jnp.float32(step)}
            )


def steps_of(workdir):
    return [record["step"] for record in writer.read_metrics(workdir)]


def test_a_line_is_one_object_with_step_first(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "loss_nats": 0.25, "train/rows": 1.0}'
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_every_write_reaches_the_disk(tmp_path):
    with writer.MetricsWriter(tmp_path, 0) as metrics:
        metrics.write(1, {"loss_nats": 1.0})
        assert steps_of(tmp_path) == [1]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with writer.MetricsWriter(tmp_path, 0) as metrics:
        metrics.write(1, {"a": float("nan"), "b": float("inf"), "c": 1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 1.0,
    }


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 5}', "{"])
def test_a_resumed_run_goes_on(tmp_path, torn):
    write_steps(tmp_path, 0, [1, 2, 3, 4])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    write_steps(tmp_path, 2, [3, 4, 5])
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    write_steps(tmp_path, 0, [1])
    assert steps_of(tmp_path) == [1]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "tensorboard",
    ]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no record"):
        writer.read_metrics(tmp_path)


def test_no_run_no_records(tmp_path):
    assert writer.read_metrics(tmp_path) == []


def test_tensorboard_events_hold_the_scalars(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert (2, "loss_nats", 0.5) in found and (1, "train/rows", 1.0) in found


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, 0, [1])
    assert list(tmp_path.iterdir()) == []
