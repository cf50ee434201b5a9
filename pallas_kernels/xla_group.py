"""The maths of `xla`: attention of one group of query blocks over its gathered key blocks.

T counts the tokens of one query block, H the query heads of one key/value head, and Q the
query blocks of the group. Nothing here knows of scans or of gradients of the whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is known when tracing; the mods take the arrays they closed over first."""

    scale: float
    causal: bool
    score_mod: Callable | None
    mask_mod: Callable | None
    num_keys: int
    dtype: jnp.dtype


class Queries(NamedTuple):
    """Differentiated; a group's own."""

    q_BGQTHK: jax.Array
    bias_BGQTJ: jax.Array | None


class Blocks(NamedTuple):
    """Differentiated; gathered for a group or shared by all groups."""

    k_BGQJCK: jax.Array
    v_BGQJCK: jax.Array
    score_floats: tuple


class Lists(NamedTuple):
    """Not differentiated; a group's own."""

    block_id_BGQJ: jax.Array  # N where nothing is listed
    token_mask_BGQJ: jax.Array | None
    segment_BQT: jax.Array | None
    token_id_BQT: jax.Array  # B, or 1 if it is the same for all


class Context(NamedTuple):
    """Not differentiated; gathered for a group or shared by all groups."""

    segment_BGQJC: jax.Array | None
    key_offset: jax.Array
    score_others: tuple
    mask_closure: tuple


def attend_group(rules, queries, blocks, lists, context):
    """Attention of a group over its gathered blocks: the one definition of the maths.

    q, k and v may come in as float32 copies: they are rounded back to `rules.dtype`,
    without loss, where they enter a matmul, and so their gradients leave it in float32.

    Returns:
        out_BGQTHK in `rules.dtype` and lse_BGQTH in float32.
    """
    matmul = functools.partial(_matmul, rules.dtype)
    s_BGQTHJC = matmul("BGQTHK,BGQJCK->BGQTHJC", queries.q_BGQTHK, blocks.k_BGQJCK)
    s_BGQTHJC *= rules.scale
    B, G, _, _, H, _, C = s_BGQTHJC.shape
    position_BGQJC = lists.block_id_BGQJ[..., None] * C + jnp.arange(C, dtype=jnp.int32)
    ids = (
        jnp.arange(B, dtype=jnp.int32)[:, None, None, None, None, None, None],
        jnp.arange(G * H, dtype=jnp.int32).reshape(G, 1, 1, H, 1, 1),
        lists.token_id_BQT[:, None, :, :, None, None, None],
        (position_BGQJC + context.key_offset)[:, :, :, None, None],
    )
    if rules.score_mod is not None:
        closure = (blocks.score_floats, context.score_others)
        s_BGQTHJC = rules.score_mod(*closure, s_BGQTHJC, *ids)
    if queries.bias_BGQTJ is not None:
        s_BGQTHJC += queries.bias_BGQTJ[:, :, :, :, None, :, None]
    in_row = (position_BGQJC < rules.num_keys)[:, :, :, None, None]
    read = in_row & _may_read(rules, ids, lists, context)
    s_BGQTHJC = jnp.where(read, s_BGQTHJC, -jnp.inf)

    # Softmax over the gathered keys; a row without keys has maximum -inf and total 0.
    maximum = s_BGQTHJC.max((-2, -1), initial=-jnp.inf, keepdims=True)
    maximum = jax.lax.stop_gradient(jnp.where(maximum > -jnp.inf, maximum, 0.0))
    p_BGQTHJC = jnp.exp(s_BGQTHJC - maximum)
    total_BGQTH = p_BGQTHJC.sum((-2, -1))
    empty_BGQTH = total_BGQTH == 0.0
    total_BGQTH = jnp.where(empty_BGQTH, 1.0, total_BGQTH)
    out_BGQTHK = matmul("BGQTHJC,BGQJCK->BGQTHK", p_BGQTHJC, blocks.v_BGQJCK)
    out_BGQTHK = (out_BGQTHK / total_BGQTH[..., None]).astype(rules.dtype)
    lse_BGQTH = maximum[..., 0, 0] + jnp.log(total_BGQTH)
    return out_BGQTHK, jnp.where(empty_BGQTH, -jnp.inf, lse_BGQTH)


def _may_read(rules, ids, lists, context):
    """Bool that broadcasts to BGQTHJC: what mask, causality and segments let pass."""
    _, _, q_id, k_id = ids
    read = jnp.array(True)
    if lists.token_mask_BGQJ is not None:
        T = lists.token_id_BQT.shape[2]
        bit = jnp.arange(T, dtype=jnp.uint32)[:, None, None, None]
        read &= (lists.token_mask_BGQJ[:, :, :, None, None, :, None] >> bit) & 1 == 1
    if rules.causal:
        read &= k_id <= q_id
    if lists.segment_BQT is not None:
        query_BQT = lists.segment_BQT[:, None, :, :, None, None, None]
        read &= query_BQT == context.segment_BGQJC[:, :, :, None, None]
    if rules.mask_mod is not None:
        read &= rules.mask_mod(*context.mask_closure, *ids)
    return read


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(dtype, spec, x, y):
    """Einsum of a batched matmul: operands and cotangents in `dtype`, sums in float32."""
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _matmul_forward(dtype, spec, x, y):
    """Saves the operands."""
    return _matmul(dtype, spec, x, y), (x, y)


def _matmul_backward(dtype, spec, operands, dz):
    """Both gradients are matmuls of the same kind: every letter stands in two terms."""
    x, y = operands
    terms, z_term = spec.split("->")
    x_term, y_term = terms.split(",")
    dx = _matmul(dtype, f"{z_term},{y_term}->{x_term}", dz, y)
    dy = _matmul(dtype, f"{z_term},{x_term}->{y_term}", dz, x)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def mod_arguments(B, G, Q, T, H, J, C, num_offsets):
    """Shapes and dtypes of score, b, h, q_id, k_id in `attend_group`."""
    b, h = (B, 1, 1, 1, 1, 1, 1), (G, 1, 1, H, 1, 1)
    q_id, k_id = (num_offsets, 1, Q, T, 1, 1, 1), (B, G, Q, 1, 1, J, C)
    ids = [jax.ShapeDtypeStruct(x, jnp.int32) for x in (b, h, q_id, k_id)]
    return jax.ShapeDtypeStruct((B, G, Q, T, H, J, C), jnp.float32), *ids
