"""Does a train step fit a TPU pod? Compiles it for one ahead of time, with no TPU: needs `jax[tpu]` only.

    python -m experiments.pod_compile --topology=v5e:16x16 [--config=configs/1m_pod.py] [--config.model.L=12 ...]

The compiler is the real one: it lays out memory and rejects what does not fit. It says nothing of speed or values.
Prints the memory of a chip and what chips send each other; ends with exit code 1 if the step does not fit.
"""

import collections
import json
import math
import os
import re
import sys
import time

# Before JAX is imported: nothing runs here, and no metadata server is asked for a TPU.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from bsa.parallel import mesh as meshes
from bsa.train import provenance, settings, step
from experiments import record

_CONFIG = config_flags.DEFINE_config_file("config", "configs/1m_pod.py")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "As libtpu names it.")
_RECORD = flags.DEFINE_bool("record", False, "Write experiments/results.")

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
NAMES = ("token_BT", "target_BT", "weight_BT", "segment_id_BT", "position_BT")


def compile_step(run: settings.RunSettings, devices):
    """The train step, compiled for these devices.

    Raises:
        ValueError: the run does not fit the number of devices.
        jax.errors.JaxRuntimeError: the compiler rejects it, because of memory for one.
    """
    mesh = meshes.make_mesh(run.mesh, devices)
    step.check(run, mesh)

    def rows(dtype):
        shape = run.data.B, run.data.T
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh))

    batch = {name: rows(jnp.int32) for name in NAMES}
    batch["weight_BT"] = rows(jnp.float32)
    state = step.abstract_state(run, mesh)
    lowered = step.make_train_step(run, mesh).lower(state, batch)
    return lowered.compile(compiler_options=compiler_options())


def compiler_options():
    """Less search than for a run: five times as fast on a pod's step, its memory within 3 %; older JAX has no choice."""
    is_new = jax.__version_info__ >= (0, 12)
    return {"optimization_level": "O1"} if is_new else {}


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """What a chip gets from others in a step, by kind: how often, and bytes.

    Loops count as often as the compiler knows them to run; rounds of exchange, which hang on the data, once.

    Args:
        text: the compiled module's HLO.
    """
    bodies = {}
    for block in re.split(r"\n(?=\S)", text):
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block):
            bodies[header[1]] = block
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]
    total = collections.defaultdict(lambda: [0, 0])
    kinds = "|".join(COLLECTIVES)

    def visit(name, times):
        for line in bodies[name].splitlines()[1:]:
            if found := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
                total[found[2]][0] += times
                total[found[2]][1] += times * _bytes(found[1], bool(found[3]))
            repeated = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            again = int(repeated[1]) if repeated else 1
            called = re.findall(
                r"(?:body|to_apply|calls|_computation)=%?([\w.\-]+)", line
            )
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                called += re.findall(r"[\w.\-]+", branches)
            for callee in called:
                if callee in bodies:
                    visit(callee, times * again)

    visit(entry, 1)
    return {kind: tuple(total[kind]) for kind in sorted(total)}


def _bytes(shape, is_start):
    """Of the result; a start's result holds its operands first, and is as long as those and the result."""
    parts = [
        BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in BYTES
    ]
    return max(parts, default=0) if is_start else sum(parts)


def main(argv: list[str]) -> None:
    """Compiles, prints, records."""
    del argv
    run = settings.from_config(_CONFIG.value)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=_TOPOLOGY.value
    )
    began = time.monotonic()
    try:
        compiled = compile_step(run, topology.devices)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"{_TOPOLOGY.value}: does not fit: {reason}", file=sys.stderr)
        sys.exit(1)
    memory = compiled.memory_analysis()
    params = step.abstract_state(
        run, meshes.make_mesh(run.mesh, topology.devices)
    ).params
    row = {
        "topology": _TOPOLOGY.value,
        "chips": len(topology.devices),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "rows": run.data.B,
        "tokens": run.data.T,
        "compile_s": round(time.monotonic() - began),
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    for kind, (count, size) in collectives(compiled.as_text()).items():
        row |= {f"{kind}_count": count, f"{kind}_bytes": size}
    print(json.dumps(row, indent=1))
    if _RECORD.value:
        record.write("pod_compile", provenance.provenance(), [row])


if __name__ == "__main__":
    app.run(main)
