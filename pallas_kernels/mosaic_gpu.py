"""Block-sparse attention on Hopper GPUs: fits a call to the kernel's tiles, and joins its gradient.

The kernels are written in Pallas Mosaic GPU. On an H100 200 random calls agree with the
oracle, values and gradients (`experiments/bench_kernels.py`, 2026-11-22). A `score_mod`
whose derivative is made of more than `mosaic_gpu_backward.ELEMENTWISE` is differentiated by
`xla`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import (
    closure,
    mosaic_gpu_backward,
    mosaic_gpu_forward,
    mosaic_gpu_operands,
    tiles,
    xla,
)

INSTEAD = mosaic_gpu_operands.INSTEAD


def attend(
    q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, options, interpret=None
):
    """Computes `dispatch.block_sparse_attention` on a Hopper GPU.

    Query blocks have 16, 32, 64 or 128 tokens; also 8, 4, 2 or 1 if as many query heads share
    a key/value head, a power of two from 8, that they and the tokens make 64 rows or more.

    Args:
        interpret: None on a card. `plgpu.InterpretGPUParams()` runs on any device, slowly;
            False compiles without asking which device this is.
    Raises:
        NotImplementedError: not a Hopper GPU, or sizes or options that the kernel lacks.
    """
    check(q_BTHK, selection, options, interpret)
    B, _, Q = selection.count_BGQ.shape
    first_id_Q = jnp.arange(Q, dtype=jnp.int32) * selection.query_block
    offset_B1 = jnp.reshape(options.query_offset, (-1, 1))
    first_id_BQ = jnp.broadcast_to(first_id_Q + offset_B1, (B, Q))
    key_offset_1 = jnp.asarray(options.key_offset, jnp.int32).reshape(1)
    rules = dataclasses.replace(options, query_offset=0, key_offset=0)
    return _attend(
        (rules, interpret),
        (q_BTHK, k_BSGK, v_BSGK, bias_BGTJ),
        (selection, segment_ids, (first_id_BQ.astype(jnp.int32), key_offset_1)),
    )


def is_hopper(device):
    """Whether a device has the tensor cores that the kernel is written for."""
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability.startswith("9.")


def check(q_BTHK, selection, options, interpret):
    """Raises NotImplementedError for what the kernels can't compute, here or anywhere."""
    if interpret is None:
        check_device(jax.devices()[0])
    _check_call(q_BTHK, selection, options)


def check_device(device):
    """Raises NotImplementedError unless the device is a Hopper GPU."""
    if not is_hopper(device):
        raise NotImplementedError(
            f"mosaic_gpu needs a Hopper GPU, not {device.device_kind}: {INSTEAD}"
        )


def _check_call(q_BTHK, selection, options):
    """Raises NotImplementedError for a call that the kernel can't compute."""
    dtype, K = q_BTHK.dtype, q_BTHK.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"mosaic_gpu multiplies bfloat16 or float16, not {dtype}: {INSTEAD}"
        )
    widest = mosaic_gpu_operands.WIDTHS[-1]
    if K > widest:
        raise NotImplementedError(
            f"mosaic_gpu has heads of at most {widest}, not K={K}: {INSTEAD}"
        )
    heads = q_BTHK.shape[2] // selection.count_BGQ.shape[1]
    blocks = mosaic_gpu_operands.list_query_blocks(heads)
    if selection.query_block not in blocks:
        raise NotImplementedError(
            f"mosaic_gpu has query blocks of {blocks} tokens for {heads} query heads a "
            f"group, not query_block={selection.query_block}: {INSTEAD}"
        )
    if selection.key_block not in mosaic_gpu_operands.BLOCKS:
        raise NotImplementedError(
            f"mosaic_gpu has key blocks of {mosaic_gpu_operands.BLOCKS} tokens, not "
            f"key_block={selection.key_block}: {INSTEAD}"
        )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    score = jax.ShapeDtypeStruct((), jnp.float32)
    for name, examples in (("score_mod", (score,)), ("mask_mod", ())):
        mod = getattr(options, name)
        _, (floats, _) = closure.convert(mod, *examples, *[scalar] * 4)
        if floats:
            raise NotImplementedError(
                f"mosaic_gpu can't read the arrays that {name} closes over: {INSTEAD}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, differentiated, others):
    """Pads, runs the kernel, and cuts the padding off."""
    rules, interpret = static
    plan, operands, _ = mosaic_gpu_operands.prepare(
        tiles.hopper_forward, rules, interpret, differentiated, others
    )
    _, T, _, K = differentiated[0].shape
    out_BTHK, lse_rows = mosaic_gpu_forward.run(plan, operands, interpret)
    lse_BHT = mosaic_gpu_operands.from_rows(plan, lse_rows)
    return out_BTHK[:, :T, :, :K], lse_BHT[..., :T]


def _forward(static, differentiated, others):
    """Saves what the kernels of the backward pass read."""
    out_BTHK, lse_BHT = _attend(static, differentiated, others)
    return (out_BTHK, lse_BHT), (differentiated, others, out_BTHK, lse_BHT)


def _backward(static, saved, cotangents):
    """Gradients by the kernels, or by `xla` if they can't differentiate the `score_mod`."""
    rules, interpret = static
    if mosaic_gpu_backward.can_differentiate(rules.score_mod):
        return mosaic_gpu_backward.differentiate(
            rules, interpret, saved, cotangents
        ), None
    differentiated, (selection, segment_ids, (first_id_BQ, key_offset_1)), *_ = saved
    rules = dataclasses.replace(
        rules, query_offset=first_id_BQ[:, 0], key_offset=key_offset_1[0]
    )

    def attend_by_xla(q_BTHK, k_BSGK, v_BSGK, bias_BGTJ):
        return xla.attend(
            q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, rules
        )

    _, pull = jax.vjp(attend_by_xla, *differentiated)
    return pull(cotangents), None


_attend.defvjp(_forward, _backward)
