"""`block_sparse_attention`: checks a call and hands it to the implementation that fits the device."""

import functools
import logging

import jax
import jax.numpy as jnp

from pallas_kernels import (
    mosaic_gpu,
    mosaic_gpu_operands,
    mosaic_tpu,
    options,
    reference,
    shapes,
    triton_gpu,
    xla,
)

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "xla": xla.attend,
    "mosaic_gpu": mosaic_gpu.attend,
    "triton": triton_gpu.attend,
    "mosaic_tpu": mosaic_tpu.attend,
}
"""Name -> `attend(q, k, v, selection, bias, segment_ids, options)`, best known by its file."""

_logger = logging.getLogger(__name__)


@jax.named_scope("block_sparse_attention")
def block_sparse_attention(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    selection,
    *,
    scale,
    bias_BGTJ=None,
    segment_ids=None,
    score_mod=None,
    mask_mod=None,
    causal=True,
    query_offset=0,
    key_offset=0,
    implementation="auto",
):
    """Attention of each query block over the key blocks selected for it.

    A query reads a key if the key's block is listed for it, and `causal`, `segment_ids`
    and `mask_mod` all allow it. Query head h reads key/value head h // (H // G). Ids of
    tokens are positions in q and k plus the offsets; ids of blocks are positions in k.
    The last query block and the last key block may be ragged.

    Args:
        q_BTHK, k_BSGK, v_BSGK: floating, all of one dtype.
        selection: which key blocks each query block reads; see `BlockSelection`.
        scale: float; multiplies logits before softmax. 1/sqrt(K) is not applied for you.
        bias_BGTJ: float32 or None, nats; added to every logit of token t against the j-th
            block of its list, after `score_mod`. -inf hides the block from the token.
        segment_ids: `SegmentIds` of packed documents, or None.
        score_mod: None, or (score, b, h, q_id, k_id) -> score, on the scaled float32
            logit. Elementwise; its arguments are arrays that broadcast against score. It
            is differentiated, also with respect to the arrays it closes over.
        mask_mod: None, or (b, h, q_id, k_id) -> bool, True where the key may be read.
            Elementwise, like `score_mod`.
        causal: a query reads only keys whose id is at most its own.
        query_offset, key_offset: id of the first query and of the first key; ints or int32
            scalars, that of queries also int32[B]: when decoding, where each sequence ends.
        implementation: a key of `IMPLEMENTATIONS`, or "auto" (the best for the default
            backend, logged once: `mosaic_gpu` on Hopper GPUs and, where jax-triton is
            installed, `triton` on Ampere and Ada, for calls that they can compute; else
            `xla`. The first excludes float32, the second mods.)
    Returns:
        out_BTHK in q's dtype, and lse_BHT in float32, natural log. A query that reads no
        key gets out 0, lse -inf and zero gradients, so that partial results merge
        exactly. Both are differentiable with respect to q, k, v and bias, in reverse mode.
    Raises:
        ValueError: shapes or dtypes disagree, or `implementation` is unknown.
        NotImplementedError: `implementation` cannot run these shapes on this device.
    """
    _check_arrays(q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids)
    _check_mod("score_mod", score_mod, jnp.float32, "fiiii")
    _check_mod("mask_mod", mask_mod, jnp.bool_, "iiii")
    if jnp.shape(query_offset) not in ((), q_BTHK.shape[:1]):
        raise ValueError(
            f"query_offset has shape {jnp.shape(query_offset)}; it must be a scalar or "
            f"one number for each of B={q_BTHK.shape[0]} sequences"
        )
    call = options.Options(
        scale=float(scale),
        causal=causal,
        score_mod=score_mod,
        mask_mod=mask_mod,
        query_offset=query_offset,
        key_offset=key_offset,
    )
    name = resolve(implementation)
    if implementation == "auto" and not _fits(name, q_BTHK, selection, call):
        name = "xla"
    out_BTHK, lse_BHT = IMPLEMENTATIONS[name](
        q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, call
    )
    return out_BTHK.astype(q_BTHK.dtype), lse_BHT


def resolve(implementation):
    """The key of `IMPLEMENTATIONS` that a call with this `implementation` runs.

    Raises:
        ValueError: it is neither such a key nor "auto".
    """
    if implementation == "auto":
        return choose(jax.default_backend())
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation={implementation!r} is none of {names}")
    return implementation


@functools.cache
def choose(platform):
    """The key of the best implementation for a platform; cached, so logged once."""
    device, choice = jax.devices()[0], "xla"
    if platform == "gpu" and mosaic_gpu.is_hopper(device):
        choice = "mosaic_gpu"
    elif platform == "gpu" and triton_gpu.is_best_for(device):
        choice = "triton"
    _logger.info("block_sparse_attention on %s runs %r", platform, choice)
    return choice


def _fits(name, q_BTHK, selection, call):
    """Whether an implementation can compute a call; "auto" gives the others to `xla`."""
    checks = {"mosaic_gpu": mosaic_gpu.check, "triton": triton_gpu.check}
    try:
        if name in checks:
            checks[name](q_BTHK, selection, call, None)
    except NotImplementedError:
        return False
    # Blocks that are wider than a tile are halved, which doubles the list.
    longest = 2 * selection.block_id_BGQJ.shape[-1]
    return name != "mosaic_gpu" or longest <= mosaic_gpu_operands.MAX_LIST


def _check_arrays(q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids):
    """Raises ValueError unless the arrays of a call fit each other."""
    selection.check(q_BTHK, k_BSGK)
    query_BT, key_BS = (None, None) if segment_ids is None else segment_ids
    shapes.check(
        q_BTHK=q_BTHK,
        k_BSGK=k_BSGK,
        v_BSGK=v_BSGK,
        block_id_BGQJ=selection.block_id_BGQJ,
        bias_BGTJ=bias_BGTJ,
        segment_query_BT=query_BT,
        segment_key_BS=key_BS,
    )
    dtypes = [jnp.dtype(x.dtype) for x in (q_BTHK, k_BSGK, v_BSGK)]
    if len(set(dtypes)) > 1 or not jnp.issubdtype(dtypes[0], jnp.floating):
        raise ValueError(
            f"q, k, v are {', '.join(map(str, dtypes))}; they must share one float dtype"
        )
    if bias_BGTJ is not None and bias_BGTJ.dtype != jnp.float32:
        raise ValueError(f"bias is {bias_BGTJ.dtype}; it must be float32")
    for name, ids in (("query", query_BT), ("key", key_BS)):
        if ids is not None and ids.dtype != jnp.int32:
            raise ValueError(f"{name} segment ids are {ids.dtype}; they must be int32")


def _check_mod(name, mod, dtype, arguments):
    """Raises ValueError unless a mod maps scalars to one scalar of `dtype`."""
    if mod is None:
        return
    dtypes = {"f": jnp.float32, "i": jnp.int32}
    result = jax.eval_shape(
        mod, *(jax.ShapeDtypeStruct((), dtypes[x]) for x in arguments)
    )
    if getattr(result, "shape", None) != () or result.dtype != dtype:
        raise ValueError(
            f"{name} makes {result} of scalars; it must make one {jnp.dtype(dtype)}"
        )
