"""Block-sparse attention on NVIDIA GPUs in Triton: checks a call, and joins its gradient.

For the cards that `mosaic_gpu` refuses (Ampere, Ada); it runs on Hopper, too. Called by
`dispatch`. The kernels are called through jax-triton, an optional requirement which needs a
card. A `score_mod` or a `mask_mod` is JAX's, and can't be traced into Triton.
"""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp

from pallas_kernels import (
    mosaic_gpu_operands,
    tiles,
    triton_gpu_plan,
)

INSTEAD = mosaic_gpu_operands.INSTEAD


def attend(
    q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, options, capability=None
):
    """Computes `dispatch.block_sparse_attention` on an NVIDIA GPU.

    Args:
        capability: None on a card; 80 compiles for an A100 without asking which device
            this is.
    Raises:
        NotImplementedError: no such GPU, no jax-triton, or what the kernels lack.
    """
    check(q_BTHK, selection, options, capability)
    B, _, Q = selection.count_BGQ.shape
    offset = jnp.asarray(options.query_offset - options.key_offset, jnp.int32)
    first_Q = jnp.arange(Q, dtype=jnp.int32) * selection.query_block
    first_position_BQ = jnp.broadcast_to(first_Q + offset.reshape(-1, 1), (B, Q))
    rules = dataclasses.replace(options, query_offset=0, key_offset=0)
    return _attend(
        (rules, capability or _capability(jax.devices()[0])),
        (q_BTHK, k_BSGK, v_BSGK, bias_BGTJ),
        (selection, segment_ids, first_position_BQ),
    )


def is_best_for(device):
    """Whether nothing faster runs on a device: Ampere or Ada, and jax-triton is there."""
    return 80 <= _capability(device) < 90 and _is_installed()


def _is_installed():
    """Whether jax-triton is; it is not imported to find out."""
    return importlib.util.find_spec("jax_triton") is not None


def _capability(device):
    """Ten times an NVIDIA GPU's compute capability; 0 of another device."""
    text = str(getattr(device, "compute_capability", ""))
    is_nvidia = device.platform == "gpu" and re.fullmatch(r"\d+\.\d", text)
    return int(text.replace(".", "")) if is_nvidia else 0


def check(q_BTHK, selection, options, capability):
    """Raises NotImplementedError for what the kernels can't compute, here or anywhere."""
    if capability is None:
        check_machine(jax.devices()[0])
    dtype, K = q_BTHK.dtype, q_BTHK.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"triton multiplies bfloat16, float16 or float32, not {dtype}: {INSTEAD}"
        )
    if K > tiles.TRITON_WIDEST:
        raise NotImplementedError(
            f"triton has heads of at most {tiles.TRITON_WIDEST}, not K={K}: {INSTEAD}"
        )
    if selection.key_block not in mosaic_gpu_operands.BLOCKS:
        raise NotImplementedError(
            f"triton has key blocks of {mosaic_gpu_operands.BLOCKS} tokens, not "
            f"{selection.key_block}: {INSTEAD}"
        )
    for name in ("score_mod", "mask_mod"):
        if getattr(options, name) is not None:
            raise NotImplementedError(
                f"triton can't trace a {name}, which is JAX's: {INSTEAD}"
            )


def check_machine(device):
    """Raises NotImplementedError unless the kernels can run on this machine."""
    if _capability(device) < 80:
        raise NotImplementedError(
            "triton needs an NVIDIA GPU of compute capability 8.0 or more, not "
            f"{device.device_kind}: {INSTEAD}"
        )
    if not _is_installed():
        raise NotImplementedError(
            "triton needs jax-triton, which is not installed (pip install "
            f"'bookmark-sparse-attention[triton]'): {INSTEAD}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, differentiated, others):
    """Pads, runs the kernel, and cuts the padding off."""
    from pallas_kernels import triton_gpu_forward

    rules, capability = static
    _, T, _, K = differentiated[0].shape
    sizes = tiles.triton_forward(*_describe(differentiated, others), capability)
    plan, operands, selection = triton_gpu_plan.prepare(
        sizes, rules, differentiated, others
    )
    out_BTHK, lse_BHT = triton_gpu_forward.run(plan, operands, selection, capability)
    return out_BTHK[:, :T, :, :K], lse_BHT[..., :T]


def _forward(static, differentiated, others):
    """Saves what the kernels of the backward pass read."""
    out_BTHK, lse_BHT = _attend(static, differentiated, others)
    return (out_BTHK, lse_BHT), (differentiated, others, out_BTHK, lse_BHT)


def _backward(static, saved, cotangents):
    """Gradients of q, k, v and bias."""
    from pallas_kernels import triton_gpu_dkv, triton_gpu_dq

    rules, capability = static
    differentiated, others, *results = saved
    q_BTHK, k_BSGK, _, bias_BGTJ = differentiated
    (_, T, _, K), S = q_BTHK.shape, k_BSGK.shape[1]

    def prepare(sizes):
        plan, operands, selection = triton_gpu_plan.prepare(
            sizes, rules, differentiated, others
        )
        arrays = _prepare_cotangents(plan, *results, *cotangents)
        return plan, operands, arrays, selection

    rows, *head = _describe(differentiated, others)
    plan, *arrays, selection = prepare(tiles.triton_dq(rows, *head, capability))
    dq_BTHK, dbias_BHTJ = triton_gpu_dq.run(plan, *arrays, selection, capability)
    dbias_BGTJ = None
    if dbias_BHTJ is not None:
        dbias_BGTJ = _sum_bias(plan, dbias_BHTJ, selection, bias_BGTJ.shape)
    sizes = tiles.triton_dkv(*head, capability, others[0].key_block)
    dk_BSGK, dv_BSGK = triton_gpu_dkv.run(*prepare(sizes), capability)
    gradients = (
        dq_BTHK[:, :T, :, :K],
        dk_BSGK[:, :S, :, :K],
        dv_BSGK[:, :S, :, :K],
        dbias_BGTJ,
    )
    return gradients, None


_attend.defvjp(_forward, _backward)


def _describe(differentiated, others):
    """What tiles depend on: rows of a list, head width, bytes of an element."""
    q_BTHK, k_BSGK, *_ = differentiated
    heads = q_BTHK.shape[2] // k_BSGK.shape[2]
    return (
        heads * others[0].query_block,
        q_BTHK.shape[-1],
        q_BTHK.dtype.itemsize,
    )


def _prepare_cotangents(plan, out_BTHK, lse_BHT, d_out_BTHK, d_lse_BHT):
    """Padded: cotangent of out, lse as powers of two, and delta."""
    lse_BHT, delta_BHT = mosaic_gpu_operands.find_delta(
        out_BTHK, lse_BHT, d_out_BTHK, d_lse_BHT
    )
    lse_BHT *= triton_gpu_plan.LOG2E
    pad = mosaic_gpu_operands.pad
    return (
        pad(d_out_BTHK, {1: plan.T, 3: plan.K}),
        pad(lse_BHT, {2: plan.T}, fill=jnp.inf),
        pad(delta_BHT, {2: plan.T}),
    )


def _sum_bias(plan, dbias_BHTJ, selection, shape):
    """Gradient of the bias, of a shape BGTJ, from that of each query head."""
    dbias_BGTJ = dbias_BHTJ.reshape(plan.B, plan.G, plan.heads, plan.T, plan.J).sum(2)
    listed_BGQJ = jnp.arange(plan.J) < selection.count_BGQ[..., None]
    listed_BGTJ = jnp.repeat(listed_BGQJ, plan.query_block, axis=2)
    dbias_BGTJ = jnp.where(listed_BGTJ, dbias_BGTJ, 0.0)[:, :, : shape[2]]
    # A list of halved blocks has several entries for one.
    return dbias_BGTJ.reshape(*shape, plan.J // shape[3]).sum(-1)
