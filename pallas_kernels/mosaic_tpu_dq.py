"""Gradients of queries and biases on TPUs in Pallas: the forward pass's walk, once more.

Called by `mosaic_tpu`. Weights are computed again from the saved lse.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    mosaic_tpu_forward,
    mosaic_tpu_gather,
    mosaic_tpu_logits,
    mosaic_tpu_plan,
)


class Operands(NamedTuple):
    """Those of the forward kernel, the output's cotangent, and `stats`.

    Attributes:
        stats: float32[B * G * Q, parts, 2, rows]: lse (0 for a row that read nothing), and
            what the softmax's gradient subtracts: sum(out * dout) - dlse.
    """

    lists: Any
    next_lists: Any
    offset: Any
    q: Any
    k: Any
    v: Any
    dout: Any
    stats: Any
    segment_query: Any = None
    segment_key: Any = None
    bias: Any = None


class Scratch(NamedTuple):
    """VMEM and the like of the dQ kernel."""

    k: Any
    v: Any
    segment_key: Any
    ring: mosaic_tpu_gather.Ring
    acc: Any


def run(plan, operands, dout, stats):
    """Differentiates.

    Args:
        operands: the forward kernel's.
        dout: laid out like q.
    Returns:
        dq, laid out like q, and dbias, laid out like the bias, or None.
    """
    grid = mosaic_tpu_plan.split_grid(plan, plan.groups * plan.Q)
    outputs = [jax.ShapeDtypeStruct(operands.q.shape, plan.dtype)]
    if plan.has_bias:
        outputs.append(jax.ShapeDtypeStruct(operands.bias.shape, jnp.float32))
    specs = mosaic_tpu_forward.specs(plan, operands, grid[1])
    specs = Operands(
        **specs._asdict(),
        dout=mosaic_tpu_plan.blocked(dout, grid[1]),
        stats=mosaic_tpu_plan.blocked(stats, grid[1]),
    )
    dq, *dbias = mosaic_tpu_plan.call(
        plan,
        lambda *refs: _run_program(plan, grid[1], *refs),
        grid,
        Operands(**operands._asdict(), dout=dout, stats=stats),
        specs,
        [(x, mosaic_tpu_plan.blocked(x, grid[1])) for x in outputs],
        Scratch(
            *mosaic_tpu_forward.ring_scratch(plan, operands),
            acc=pltpu.VMEM((plan.parts, plan.K, plan.rows), jnp.float32),
        ),
        "bsa_dq",
    )
    return dq, dbias[0] if dbias else None


def _run_program(plan, length, inputs, dq_ref, *refs):
    """Gradients of one query block and of its list's biases."""
    *dbias_ref, scratch = refs
    dot = mosaic_tpu_plan.dot
    scratch.acc[...] = jnp.zeros_like(scratch.acc)
    for ref in dbias_ref:
        ref[...] = jnp.zeros_like(ref)

    def differentiate(k, v, entry, pairs):
        @pl.loop(0, plan.parts)
        def _differentiate_part(part):
            def weigh(s):
                return mosaic_tpu_forward.weigh_tile(plan, inputs, pairs, part, s)

            s, pull = jax.vjp(weigh, dot(k, inputs.q[part], 1, 1))
            lse, shift = inputs.stats[part, 0:1], inputs.stats[part, 1:2]
            ds = jnp.exp(s - lse) * (dot(v, inputs.dout[part], 1, 1) - shift)
            for ref in dbias_ref:
                ds_blocks = ds.reshape(plan.blocks, plan.key_block, plan.rows)
                mosaic_tpu_logits.add_bias(plan, ref, entry, ds_blocks.sum(axis=1))
            (ds,) = pull(ds)
            scratch.acc[part] += dot(k, ds.astype(plan.dtype), 0, 0)

    lists = mosaic_tpu_gather.read_lists(inputs, length)
    mosaic_tpu_forward.walk(plan, lists, inputs, scratch, differentiate)

    @pl.loop(0, plan.parts)
    def _store(part):
        dq_ref[part] = scratch.acc[part].T.astype(plan.dtype)
