"""Where a compiled step's time on a GPU goes: kernels of a trace summed by the part of the model that asked for them."""

import collections
import gzip
import pathlib
import re

import jax

PARTS = (
    "index",
    "route",
    "unite",
    "block_sparse_attention",
    "dense",
    "attention",
    "mlp",
    "loss",
    "optimizer",
)
"""Names in the compiler's metadata, the scopes that the code opens; `attention` is what surrounds the five before it."""

OWN_KERNELS = {"attend": "block_sparse_attention", "search": "route"}
"""First words of our kernels' names to parts: in a CUDA graph a kernel's name is all that is known of it."""

_HLO = "step.hlo.txt.gz"
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE
)
_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")


def trace(folder: pathlib.Path, compiled, run) -> None:
    """Runs a function under the profiler, and keeps beside its trace what the compiler knows of its operations.

    Args:
        compiled: the executable that `run` calls.
        run: waits for what it starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / _HLO, "wt") as file:
        file.write(compiled.as_text())
    with jax.profiler.trace(str(folder)):
        run()


def milliseconds(folder: pathlib.Path) -> dict[str, float]:
    """Kernels' time by part, `other`, and `unnamed` (copies and library kernels in CUDA graphs), of what `trace` wrote.

    Raises:
        FileNotFoundError: it holds no trace of a GPU.
    """
    with gzip.open(folder / _HLO, "rt") as file:
        names = dict(_INSTRUCTION.findall(file.read()))
    names |= {re.sub(r"[.\-]", "_", name): scope for name, scope in names.items()}
    total = collections.Counter()
    for path in folder.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        total[part_of(event, names)] += event.duration_ns / 1e6
    if not total:
        raise FileNotFoundError(f"{folder} holds no trace of a GPU")
    return {part: total[part] for part in (*PARTS, "other", "unnamed")}


def part_of(event, names: dict[str, str]) -> str:
    """The innermost part named in the metadata of an event's operation."""
    stats = dict(event.stats)
    scope = names.get(str(stats.get("hlo_op"))) or stats.get("name")
    scope = scope or names.get(event.name)
    if scope is None:
        return OWN_KERNELS.get(event.name.split("_")[0], "unnamed")
    found = _PART.findall(str(scope))
    return found[-1] if found else "other"
