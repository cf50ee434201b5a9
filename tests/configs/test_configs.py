"""Every config makes a run, says how to start it, and has no knob that nothing reads."""

import ast
import dataclasses
import importlib
import pathlib

import pytest

from bsa.train import settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__"
)


def load(name):
    return importlib.import_module(f"configs.{name}")


def settings_classes(kind=settings.RunSettings):
    """The dataclass and those of its fields, however deep."""
    yield kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from settings_classes(field.type)


def attributes_read(name):
    """Attributes read anywhere but in the class called `name`."""
    read = set()
    for folder in ("bsa", "pallas_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inside = {
                node
                for body in ast.walk(tree)
                if isinstance(body, ast.ClassDef) and body.name == name
                for node in ast.walk(body)
            }
            read |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and node not in inside
            }
    return read


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads(name):
    module = load(name)
    configs = [module.get_config()]
    configs += [module.get_config(value) for value in getattr(module, "ARGUMENTS", ())]
    for config in configs:
        assert isinstance(settings.from_config(config), settings.RunSettings)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_every_config_says_how_to_run_it(name):
    assert f"python -m bsa.main --config=configs/{name}.py" in load(name).__doc__


@pytest.mark.parametrize("kind", list(settings_classes()))
def test_every_knob_is_read(kind):
    read = attributes_read(kind.__name__)
    unread = [
        field.name for field in dataclasses.fields(kind) if field.name not in read
    ]
    assert not unread


def test_a_misspelt_knob_is_an_error():
    config = load("base").get_config()
    with config.unlocked():
        config.train.lerning_rate = 1.0
    with pytest.raises(ValueError, match="train: unknown knob lerning_rate"):
        settings.from_config(config)
