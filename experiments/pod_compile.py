"""Does a train step fit a TPU pod? Compiles it for one ahead of time, with no TPU: needs `jax[tpu]` only.

    python -m experiments.pod_compile --topology=v5e:16x16 [--config=configs/1m_pod.py] [--config.model.L=12 ...]

The compiler is the real one: it lays out memory and rejects what does not fit. It says nothing of speed or values.
Prints the memory of a chip and what chips send each other; ends with exit code 1 if the step does not fit.
"""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from bsa.parallel import mesh as meshes
from bsa.train import provenance, settings, step
from experiments import collectives, record

_CONFIG = config_flags.DEFINE_config_file("config", "configs/1m_pod.py")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "As libtpu names it.")
_RECORD = flags.DEFINE_bool("record", False, "Write experiments/results.")

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


def main(argv: list[str]) -> None:
    """Compiles, prints, records."""
    del argv
    # Nothing runs here, no metadata server is asked for a TPU, and others may compile at the same time.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
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
    for kind, (count, size) in collectives.count(compiled.as_text()).items():
        row |= {f"{kind}_count": count, f"{kind}_bytes": size}
    print(json.dumps(row, indent=1))
    if _RECORD.value:
        record.merge("pod_compile", provenance.provenance(), row, ("topology",))


if __name__ == "__main__":
    app.run(main)
