"""Block-sparse attention in plain XLA operations: any device, memory linear in tokens.

A scan walks over groups of query blocks and gathers the key blocks of each. The backward
pass walks the same way, differentiates the same `xla_group.attend_group`, and scatters its
key and value gradients into float32 totals. Called by `dispatch`, which takes it where
`implementation="auto"`.

Outside the scan's steps, `xla_group.Queries` and `xla_group.Lists` hold all groups, stacked
on a leading axis, and `_Keys` and `_Context` hold what every step gathers from.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import closure, xla_group

STEP_BYTES = {"cpu": 4 * 2**20}
"""Float32 logits of one scan step, bytes, by platform. A CPU wants them in its cache: steps
of 4 MiB run forward and backward in half the time of 16 MiB (2 cores, 2026-11-22)."""

DEFAULT_STEP_BYTES = 64 * 2**20
"""The same for other platforms. Forward and backward at 32K tokens, an H100 was 13 %
slower at 16 MiB and 5 % faster at 256 MiB (one run, 2026-11-22), but a backward step holds
about five arrays of this size."""


class _Keys(NamedTuple):
    """Differentiated; becomes `xla_group.Blocks`."""

    k_BGNCK: jax.Array
    v_BGNCK: jax.Array
    score_floats: tuple


class _Context(NamedTuple):
    """Not differentiated; becomes `xla_group.Context`."""

    segment_BNC: jax.Array | None
    key_offset: jax.Array
    score_others: tuple
    mask_closure: tuple


def attend(q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, options):
    """Computes `dispatch.block_sparse_attention` on any device."""
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    (Q, J), C = selection.block_id_BGQJ.shape[2:], selection.key_block
    steps = _count_steps(Q, 4 * B * H * selection.query_block * J * C)
    blocks = (steps, -(-Q // steps))
    tokens = (*blocks, selection.query_block)
    split = (-(-S // C), C)

    q_BGTHK = q_BTHK.reshape(B, T, G, H // G, K).swapaxes(1, 2)
    queries = xla_group.Queries(
        _stack(q_BGTHK, 2, tokens), _stack(bias_BGTJ, 2, tokens)
    )
    offset_B1 = jnp.reshape(jnp.asarray(options.query_offset, jnp.int32), (-1, 1))
    score, *ids = xla_group.mod_arguments(
        B, G, *tokens[1:], H // G, J, C, len(offset_B1)
    )
    score_mod, (floats, others) = closure.convert(options.score_mod, score, *ids)
    mask_mod, mask_closure = closure.convert(options.mask_mod, *ids)
    keys = _Keys(
        _split(k_BSGK.swapaxes(1, 2), 2, split),
        _split(v_BSGK.swapaxes(1, 2), 2, split),
        floats,
    )
    query_BT, key_BS = (None, None) if segment_ids is None else segment_ids
    token = jnp.arange(math.prod(tokens), dtype=jnp.int32)
    lists = xla_group.Lists(
        _stack(_mark_unlisted(selection, split[0]), 2, blocks, fill=split[0]),
        _stack(selection.token_mask_BGQJ, 2, blocks),
        _stack(query_BT, 1, tokens),
        _stack(offset_B1 + token, 1, tokens),
    )
    context = _Context(
        _split(key_BS, 1, split),
        jnp.asarray(options.key_offset, jnp.int32),
        others,
        mask_closure,
    )
    rules = xla_group.Rules(
        options.scale, options.causal, score_mod, mask_mod, S, jnp.dtype(q_BTHK.dtype)
    )
    out, lse = _attend_groups(rules, queries, keys, lists, context)
    out_BTGHK = _unstack(out, 2, tokens, T).swapaxes(1, 2)
    lse_BGHT = _unstack(lse, 2, tokens, T).swapaxes(2, 3)
    return out_BTGHK.reshape(B, T, H, K), lse_BGHT.reshape(B, H, T)


def _count_steps(num_blocks, block_bytes):
    """Steps of a scan over query blocks whose logits, one block's, take `block_bytes`.

    A step has a power of two of them, which divides the number that most texts have: what is not padded is not computed.
    """
    step_bytes = STEP_BYTES.get(jax.default_backend(), DEFAULT_STEP_BYTES)
    step_blocks = max(1, step_bytes // max(1, block_bytes))
    return -(-num_blocks // 2 ** (step_blocks.bit_length() - 1))


def _mark_unlisted(selection, num_blocks):
    """Block ids, with `num_blocks` in the entries past `count`: one past the last block."""
    J = selection.block_id_BGQJ.shape[-1]
    listed_BGQJ = jnp.arange(J) < selection.count_BGQ[..., None]
    return jnp.where(listed_BGQJ, selection.block_id_BGQJ, num_blocks)


def _split(x, axis, sizes, fill=0):
    """Pads `axis` with `fill` and splits it into `sizes`; None passes through."""
    if x is None:
        return None
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, math.prod(sizes) - x.shape[axis])
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _stack(x, axis, sizes, fill=0):
    """Splits `axis` and moves the first of the parts, the scan's steps, to the front."""
    return None if x is None else jnp.moveaxis(_split(x, axis, sizes, fill), axis, 0)


def _unstack(x, axis, sizes, length):
    """Undoes `_stack` and cuts the padding off `axis`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + len(sizes) :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_groups(rules, queries, keys, lists, context):
    """Scans over groups; out and lse keep the steps in front."""

    def step(_, group):
        queries, lists = group
        blocks, group_context = _gather(keys, context, lists.block_id_BGQJ)
        return None, xla_group.attend_group(
            rules, queries, blocks, lists, group_context
        )

    return jax.lax.scan(step, None, (queries, lists))[1]


def _forward(rules, queries, keys, lists, context):
    """Saves the inputs alone: the backward pass recomputes each group."""
    inputs = (queries, keys, lists, context)
    return _attend_groups(rules, *inputs), inputs


def _backward(rules, inputs, cotangents):
    """Scans again, differentiates each group, and totals what groups share in float32."""
    queries, keys, lists, context = inputs

    def step(totals, group):
        queries, lists, cotangent = group
        blocks, group_context = _gather(keys, context, lists.block_id_BGQJ)
        _, pull = jax.vjp(
            lambda *inputs: xla_group.attend_group(
                rules, *inputs, lists, group_context
            ),
            queries._replace(q_BGQTHK=queries.q_BGQTHK.astype(jnp.float32)),
            blocks._replace(
                k_BGQJCK=blocks.k_BGQJCK.astype(jnp.float32),
                v_BGQJCK=blocks.v_BGQJCK.astype(jnp.float32),
            ),
        )
        d_queries, d_blocks = pull(cotangent)
        totals = _Keys(
            _scatter_add(totals.k_BGNCK, lists.block_id_BGQJ, d_blocks.k_BGQJCK),
            _scatter_add(totals.v_BGNCK, lists.block_id_BGQJ, d_blocks.v_BGQJCK),
            jax.tree.map(jnp.add, totals.score_floats, d_blocks.score_floats),
        )
        return totals, _cast_like(d_queries, queries)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys)
    d_keys, d_queries = jax.lax.scan(step, zeros, (queries, lists, cotangents))
    return d_queries, _cast_like(d_keys, keys), None, None


_attend_groups.defvjp(_forward, _backward)


def _gather(keys, context, block_id_BGQJ):
    """What a group reads. An unlisted entry gets the last block, and will be masked."""

    def take(x_N, block_id):
        return x_N.at[block_id].get(mode="clip")

    blocks = xla_group.Blocks(
        jax.vmap(jax.vmap(take))(keys.k_BGNCK, block_id_BGQJ),
        jax.vmap(jax.vmap(take))(keys.v_BGNCK, block_id_BGQJ),
        keys.score_floats,
    )
    segment_BGQJC = None
    if context.segment_BNC is not None:
        segment_BGQJC = jax.vmap(take)(context.segment_BNC, block_id_BGQJ)
    return blocks, xla_group.Context(segment_BGQJC, *context[1:])


def _scatter_add(total_BGNCK, block_id_BGQJ, x_BGQJCK):
    """Adds a group's blocks to the totals; what an unlisted entry holds is dropped."""

    def add(total_NCK, block_id_QJ, x_QJCK):
        return total_NCK.at[block_id_QJ].add(x_QJCK, mode="drop")

    return jax.vmap(jax.vmap(add))(total_BGNCK, block_id_BGQJ, x_BGQJCK)


def _cast_like(tree, like):
    """Gradients in the dtypes of what they belong to."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
