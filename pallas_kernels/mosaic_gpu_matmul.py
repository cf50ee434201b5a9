"""Products on the tensor cores of a Mosaic GPU kernel, and their stand-in for interpretation."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def multiply(*pairs, meanwhile=lambda: None):
    """x @ y in float32 for each pair of matrices in shared memory.

    Args:
        meanwhile: runs while the tensor cores work.
    """

    def start(*acc_refs):
        for acc_ref, (x_ref, y_ref) in zip(acc_refs, pairs):
            plgpu.wgmma(acc_ref, x_ref, y_ref)
        meanwhile()
        return [acc_ref[...] for acc_ref in acc_refs]

    shapes = [(x_ref.shape[0], y_ref.shape[1]) for x_ref, y_ref in pairs]
    return pl.run_scoped(start, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def multiply_add(plan, accs, pairs, meanwhile=lambda: None):
    """acc + x @ y for each sum and its pair: x in registers, y in shared memory."""
    if plan.interpreted:
        # Interpret mode has neither `run_state` nor an operand in registers. Unlike the
        # tensor cores' reads, these aren't ordered before the copy that comes next.
        meanwhile()
        ys = [y_ref[...] for _, y_ref in pairs]
        plgpu.commit_smem()
        return [
            acc + jnp.dot(x, y, preferred_element_type=jnp.float32)
            for acc, (x, _), y in zip(accs, pairs, ys)
        ]

    def start(acc_refs):
        for acc_ref, (x, y_ref) in zip(acc_refs, pairs):
            plgpu.wgmma(acc_ref, x, y_ref)
        meanwhile()

    return pl.run_state(start)([plgpu.ACC.init(acc) for acc in accs])


def multiply_add_shared(plan, accs, pairs):
    """acc + x @ y for each sum and its pair, both in shared memory."""
    if plan.interpreted:
        return [acc + x for acc, x in zip(accs, multiply(*pairs))]

    def start(acc_refs):
        for acc_ref, (x_ref, y_ref) in zip(acc_refs, pairs):
            plgpu.wgmma(acc_ref, x_ref, y_ref)

    return pl.run_state(start)([plgpu.ACC.init(acc) for acc in accs])


def zeros(*shape, layout):
    """Float32 zeros in registers."""
    return plgpu.layout_cast(jnp.full(shape, 0.0, jnp.float32), layout)
