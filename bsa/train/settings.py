"""A ConfigDict to frozen dataclasses: the one place where configuration ends and settings begin."""

import dataclasses

import ml_collections

from bsa.index import settings as index_settings
from bsa.model import rope
from bsa.model import settings as model_settings
from bsa.parallel import mesh
from bsa.pretrained import settings as pretrained_settings
from bsa.tasks import settings as data_settings


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Optimisation and its bookkeeping; `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int
    start_steps: int
    start_pattern: str
    start_window_tokens: tuple[int, ...]
    learning_rate: float
    warmup_steps: int
    final_learning_rate_share: float
    teach_weight: float
    span_weight: float
    weight_decay: float
    b1: float
    b2: float
    clip_norm: float
    accumulation_steps: int
    loss_chunk_tokens: int
    log_every_steps: int
    evaluate_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int

    def __post_init__(self):
        for name in (
            "steps",
            "accumulation_steps",
            "loss_chunk_tokens",
            "log_every_steps",
            "evaluate_every_steps",
            "checkpoint_every_steps",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"train: {name}={getattr(self, name)} must be at least 1"
                )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"train: warmup_steps={self.warmup_steps} must be fewer than steps={self.steps}"
            )
        if self.start_steps < 0 or (self.start_steps > 0) != bool(self.start_pattern):
            raise ValueError(
                f"train: start_steps={self.start_steps} and start_pattern={self.start_pattern!r}; set both, or neither"
            )


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How much held-out text and how many passkeys are tried.

    Raises:
        ValueError: a value is out of range.
    """

    quick_batches: int
    batches: int
    position_buckets: int
    passkey_tokens: tuple[int, ...]
    passkey_depths: int
    passkey_samples: int

    def __post_init__(self):
        for name in (
            "quick_batches",
            "batches",
            "position_buckets",
            "passkey_depths",
            "passkey_samples",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluation: {name}={getattr(self, name)} must be at least 1"
                )


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything a run needs to know.

    Raises:
        ValueError: two parts do not fit.
    """

    seed: int
    profile: int
    model: model_settings.ModelSettings
    pretrained: pretrained_settings.PretrainedSettings
    data: data_settings.DataSettings
    train: TrainSettings
    evaluation: EvaluationSettings
    mesh: mesh.MeshSettings

    def __post_init__(self):
        if self.profile and not 0 < self.profile < self.train.steps - 10:
            raise ValueError(
                f"profile={self.profile} steps after the tenth do not fit into "
                f"train.steps={self.train.steps}"
            )
        index = self.model.index
        if set(self.model.pattern) - {"d"}:
            for length in (self.data.T, *self.evaluation.passkey_tokens):
                for name in ("C", "query_block"):
                    if length % getattr(index, name):
                        raise ValueError(
                            f"T={length} is no multiple of index.{name}={getattr(index, name)}; "
                            f"T={-(-length // getattr(index, name)) * getattr(index, name)} would work"
                        )
        model = self.model
        if self.pretrained.source and (
            model.route_width
            or model.branch_gates
            or model.ask_again
            or model.index.spans == "learned"
        ):
            raise ValueError(
                f"model.route_width={model.route_width}, branch_gates={model.branch_gates}, ask_again={model.ask_again}, "
                f"index.spans={model.index.spans!r}: a published checkpoint has no queries of an index, no gates, no second "
                "question and no boundaries; set them to 0, False, False and 'alike'"
            )
        if self.train.teach_weight and not self.model.taught_rows:
            raise ValueError(
                f"train.teach_weight={self.train.teach_weight} needs rows to teach by; set model.taught_rows, to 64 say"
            )
        if len(self.train.start_pattern or self.model.pattern) != len(
            self.model.pattern
        ):
            raise ValueError(
                f"train.start_pattern={self.train.start_pattern!r} needs as many letters as model.pattern={self.model.pattern!r}"
            )
        for _, stage in data_settings.stages(self.data):
            if not stage.B % self.train.accumulation_steps:
                continue
            raise ValueError(
                f"B={stage.B} rows do not split into accumulation_steps={self.train.accumulation_steps} micro-batches"
            )

    @property
    def start_model(self) -> model_settings.ModelSettings:
        """The model as it reads in the first `train.start_steps`."""
        return dataclasses.replace(
            self.model,
            pattern=self.train.start_pattern or self.model.pattern,
            window_tokens=self.train.start_window_tokens or self.model.window_tokens,
        )


SECTIONS = {
    "index": index_settings.IndexSettings,
    "model": model_settings.ModelSettings,
    "pretrained": pretrained_settings.PretrainedSettings,
    "data": data_settings.DataSettings,
    "train": TrainSettings,
    "evaluation": EvaluationSettings,
    "mesh": mesh.MeshSettings,
}
"""Parts of a config, and what they become."""


def from_config(config: ml_collections.ConfigDict) -> RunSettings:
    """Builds the settings of a run; every knob must be known, and none may be missing.

    Raises:
        ValueError: a knob is unknown, missing, or holds an impossible value.
    """
    values = config.to_dict()
    index = _build(index_settings.IndexSettings, "index", values.pop("index"))
    scaling = _build(rope.Scaling, "rope_scaling", values["model"].pop("rope_scaling"))
    values["model"] |= {"index": index, "rope_scaling": scaling}
    for name, kind in SECTIONS.items():
        if name in values:
            values[name] = _build(kind, name, values[name])
    return _build(RunSettings, "config", values)


def complete(kept: dict) -> dict:
    """What an earlier version kept of a run, with the knobs that came later.

    They get the defaults of their dataclasses, which leave everything as it was; a knob without one still is missing.
    """
    completed = dict(kept)
    for name, kind in SECTIONS.items():
        later = {
            field.name: field.default
            for field in dataclasses.fields(kind)
            if isinstance(field.default, bool | int | float | str)
        }
        completed[name] = later | kept.get(name, {})
    return completed


def _build(kind, where, values):
    """The dataclass `kind` from exactly its fields."""
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{where}: unknown knob {', '.join(unknown)}; the knobs are {', '.join(sorted(known))}"
        )
    if missing := sorted(known - set(values)):
        raise ValueError(f"{where}: missing knob {', '.join(missing)}")
    return kind(**values)
