"""Which checkpoint a run starts from, and which of its layers keep their attention. Checked once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PretrainedSettings:
    """A published checkpoint; `configs/base.py` gives the reason of each knob.

    Raises:
        ValueError: layers are to keep the attention of a checkpoint, but none is named.
    """

    source: str
    kept_layers: tuple[int, ...]

    def __post_init__(self):
        if self.kept_layers and not self.source:
            raise ValueError(
                f"pretrained: kept_layers={self.kept_layers} of no checkpoint; set source"
            )
