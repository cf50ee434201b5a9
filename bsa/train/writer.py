"""Scalars of a run to `metrics.jsonl` and TensorBoard events, going on where a run stopped.

`bsa/train/loop.py` writes; `bsa/train/figures.py` and people read. A line is one JSON
object, "step" first. All processes may write, and process 0 does.
"""

import contextlib
import json
import math
import os
import pathlib

import jax
import tensorboardX

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends scalars by step; a context manager.

    Args:
        workdir: folder of the run, which exists.
        start_step: the step a run goes on from. What was written for later steps, and
            a last line that was cut off, is dropped first, in one rename.
    """

    def __init__(self, workdir, start_step: int = 0):
        self._lines = self._events = None
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        _rewind(workdir, start_step)
        self._lines = (workdir / METRICS_FILE).open("a", encoding="utf-8")
        # TensorBoard drops what older event files say of the steps from purge_step on.
        self._events = tensorboardX.SummaryWriter(
            str(workdir / EVENTS_FOLDER), purge_step=start_step + 1
        )

    def write(self, step: int, scalars: dict) -> None:
        """Writes one line, and flushes it. NaN and infinities become null in the line.

        Args:
            scalars: name to a number or a 0-d array; slashes group names in TensorBoard.
        """
        if self._lines is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
        self._lines.write(json.dumps({"step": step} | finite) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Closes both files; writing is over."""
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_metrics(workdir) -> list[dict]:
    """The records of a run, in the order written; a last line cut off is left out.

    Raises:
        ValueError: a whole line is no JSON object with a step.
    """
    path = pathlib.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is no record: {line}") from error
        records.append(record)
    with contextlib.suppress(ValueError):
        records.append(json.loads(last))
    return records


def _rewind(workdir, start_step):
    """Drops records of steps after `start_step`."""
    kept = [record for record in read_metrics(workdir) if record["step"] <= start_step]
    draft = workdir / f"{METRICS_FILE}.tmp"
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(workdir / METRICS_FILE)
