"""Block-sparse attention on Hopper GPUs: fits a call to the kernel's tiles, and joins its gradient.

The kernel is written in Pallas Mosaic GPU. It has been interpreted and compiled, never run
on a card, so "auto" doesn't choose it. The backward pass is that of `xla`, until there are
kernels for it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import (
    closure,
    mosaic_gpu_forward,
    mosaic_gpu_plan,
    tiles,
    xla,
)

BLOCKS = (16, 32, 64, 128)
"""Query and key blocks that fill tiles, tokens."""
WIDTHS = (64, 128, 256)
"""Head widths; smaller ones are padded with zeros."""
MAX_LIST = 3072
"""Entries of a list that fit in shared memory beside the tiles."""
INSTEAD = "use implementation='xla' (any device) or 'reference' (small inputs)"


def attend(
    q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, options, interpret=None
):
    """Computes `dispatch.block_sparse_attention` on a Hopper GPU.

    Args:
        interpret: None on a card. `plgpu.InterpretGPUParams()` runs on any device, slowly;
            False compiles without asking which device this is.
    Raises:
        NotImplementedError: not a Hopper GPU, or sizes or options that the kernel lacks.
    """
    if interpret is None:
        _check_device(jax.devices()[0])
    _check_call(q_BTHK, selection, options)
    offset_2 = jnp.stack(
        [jnp.asarray(x, jnp.int32) for x in (options.query_offset, options.key_offset)]
    )
    rules = dataclasses.replace(options, query_offset=0, key_offset=0)
    return _attend(
        (rules, interpret),
        (q_BTHK, k_BSGK, v_BSGK, bias_BGTJ),
        (selection, segment_ids, offset_2),
    )


def is_hopper(device):
    """Whether a device has the tensor cores that the kernel is written for."""
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability.startswith("9.")


def _check_device(device):
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
    if K > WIDTHS[-1]:
        raise NotImplementedError(
            f"mosaic_gpu has heads of at most {WIDTHS[-1]}, not K={K}: {INSTEAD}"
        )
    if jnp.ndim(options.query_offset):
        raise NotImplementedError(
            f"mosaic_gpu has one query_offset for all sequences: {INSTEAD}"
        )
    for name in ("query_block", "key_block"):
        if getattr(selection, name) not in BLOCKS:
            raise NotImplementedError(
                f"mosaic_gpu has blocks of {BLOCKS} tokens, not "
                f"{name}={getattr(selection, name)}: {INSTEAD}"
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
    q_BTHK, k_BSGK, v_BSGK, bias_BGTJ = differentiated
    selection, segment_ids, offset_2 = others
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    width = next(x for x in WIDTHS if x >= K)
    rows = H // G * selection.query_block
    sizes = tiles.hopper_forward(rows, width)
    if selection.key_block > sizes.keys:
        selection, bias_BGTJ = _halve_blocks(selection, bias_BGTJ)
    # Lists end at whole tiles, and start at multiples of 128 bytes.
    J = _round_up(selection.block_id_BGQJ.shape[-1], 32)
    if J > MAX_LIST:
        raise NotImplementedError(
            f"mosaic_gpu has lists of at most {MAX_LIST} entries, not J={J}: {INSTEAD}"
        )
    Q, C = selection.count_BGQ.shape[-1], selection.key_block
    plan = mosaic_gpu_plan.Plan(
        B=B,
        H=H,
        G=G,
        K=width,
        Q=Q,
        J=J,
        query_block=selection.query_block,
        key_block=C,
        num_keys=S,
        dtype=jnp.dtype(q_BTHK.dtype),
        has_mask=selection.token_mask_BGQJ is not None,
        has_bias=bias_BGTJ is not None,
        has_segments=segment_ids is not None,
        tiles=sizes,
        interpreted=bool(interpret),
        scale=rules.scale,
        causal=rules.causal,
        score_mod=rules.score_mod,
        mask_mod=rules.mask_mod,
    )
    tokens, keys = Q * plan.query_block, _round_up(S, C)
    query_BT, key_BS = (None, None) if segment_ids is None else segment_ids
    mask_BGQJ = selection.token_mask_BGQJ
    if plan.has_mask:
        mask_BGQJ = jax.lax.bitcast_convert_type(mask_BGQJ, jnp.int32)
    operands = mosaic_gpu_plan.Operands(
        q_BTHK=_pad(q_BTHK, {1: tokens, 3: width}),
        k_BSGK=_pad(k_BSGK, {1: keys, 3: width}),
        v_BSGK=_pad(v_BSGK, {1: keys, 3: width}),
        block_id_BGQJ=_pad(selection.block_id_BGQJ, {3: J}),
        count_BGQ=selection.count_BGQ,
        offset_2=offset_2,
        token_mask_BGQJ=_pad(mask_BGQJ, {3: J}),
        bias_rows=_spread_bias(plan, _pad(bias_BGTJ, {2: tokens, 3: J})),
        segment_rows=_spread_tokens(plan, _pad(query_BT, {1: tokens})),
        segment_key_BS=_pad(key_BS, {1: keys}),
    )
    out_BTHK, lse_rows = mosaic_gpu_forward.run(plan, operands, interpret)
    lse_rows = lse_rows[..., : plan.heads * plan.query_block]
    lse_BGQHT = lse_rows.reshape(B, G, Q, plan.heads, plan.query_block)
    lse_BHT = lse_BGQHT.swapaxes(2, 3).reshape(B, H, tokens)
    return out_BTHK[:, :T, :, :K], lse_BHT[..., :T]


def _forward(static, differentiated, others):
    """Saves the inputs alone."""
    return _attend(static, differentiated, others), (differentiated, others)


def _backward(static, inputs, cotangents):
    """Differentiates `xla`, which computes its own forward pass again."""
    rules, _ = static
    differentiated, (selection, segment_ids, offset_2) = inputs
    rules = dataclasses.replace(rules, query_offset=offset_2[0], key_offset=offset_2[1])

    def attend_by_xla(q_BTHK, k_BSGK, v_BSGK, bias_BGTJ):
        return xla.attend(
            q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, rules
        )

    _, pull = jax.vjp(attend_by_xla, *differentiated)
    return pull(cotangents), None


_attend.defvjp(_forward, _backward)


def _halve_blocks(selection, bias_BGTJ):
    """The same lists with key blocks half as long, for a key tile shorter than a block."""

    def double(x_J):
        return None if x_J is None else jnp.repeat(x_J, 2, axis=-1)

    block_id_BGQJ = double(selection.block_id_BGQJ)
    half_J = jnp.arange(block_id_BGQJ.shape[-1], dtype=jnp.int32) % 2
    halved = dataclasses.replace(
        selection,
        block_id_BGQJ=jnp.where(block_id_BGQJ < 0, -1, 2 * block_id_BGQJ + half_J),
        count_BGQ=2 * selection.count_BGQ,
        token_mask_BGQJ=double(selection.token_mask_BGQJ),
        key_block=selection.key_block // 2,
    )
    return halved, double(bias_BGTJ)


def _spread_tokens(plan, x_BT):
    """`Operands.segment_rows`."""
    if x_BT is None:
        return None
    x_BQT = x_BT.reshape(plan.B, plan.Q, plan.query_block)
    return jnp.tile(x_BQT, (1, 1, plan.part_heads))


def _spread_bias(plan, bias_BGTJ):
    """`Operands.bias_rows`: as many copies of the bias as a part has heads."""
    if bias_BGTJ is None:
        return None
    bias_BGQTJ = bias_BGTJ.reshape(plan.B, plan.G, plan.Q, plan.query_block, plan.J)
    return jnp.tile(bias_BGQTJ.swapaxes(3, 4), (1, 1, 1, 1, plan.part_heads))


def _round_up(x, multiple):
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def _pad(x, sizes):
    """Pads axes with zeros up to sizes, {axis: size}; None passes through."""
    if x is None:
        return None
    padding = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x
