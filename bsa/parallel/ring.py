"""Keys and values on a round trip: each device attends to whatever is visiting, and results are merged by lse.

`visit` is the ring for any attention of one visitor; gradients of keys and values travel with them (Liu et al., 2023).
Everything here runs on one shard. Called by `attend`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bsa.parallel import merge


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def visit(attend, devices, q_BTHK, k_BSGK, v_BSGK, fixed):
    """Attends to the keys of all devices along "context".

    Args:
        attend: function (q, k, v, owner, fixed) -> out_BTHK, lse_BHT over the keys that `owner` sent; differentiable
            with respect to q, k and v, and without collectives.
        devices: along "context".
        fixed: tree of arrays that `attend` gets too, and that have no gradient.
    Returns:
        out_BTHK in q's dtype and lse_BHT in float32.
    """
    own = lax.axis_index("context")

    def step(i, carry):
        keys, whole = carry
        following = _pass_on(keys, devices)  # while this device attends
        part = attend(q_BTHK, *keys, (own - i) % devices, fixed)
        return following, merge.merge(whole, part)

    start = (k_BSGK, v_BSGK), merge.nothing(q_BTHK)
    keys, whole = lax.fori_loop(0, devices - 1, step, start)
    last = attend(q_BTHK, *keys, (own + 1) % devices, fixed)
    out_BTHK, lse_BHT = merge.merge(whole, last)
    return out_BTHK.astype(q_BTHK.dtype), lse_BHT


def _forward(attend, devices, q_BTHK, k_BSGK, v_BSGK, fixed):
    whole = visit(attend, devices, q_BTHK, k_BSGK, v_BSGK, fixed)
    return whole, (q_BTHK, k_BSGK, v_BSGK, fixed, whole)


def _backward(attend, devices, saved, cotangents):
    """Sends keys round again, and their gradients one step behind them, home in the end."""
    q_BTHK, k_BSGK, v_BSGK, fixed, whole = saved
    own = lax.axis_index("context")

    def meet(i, keys):
        owner = (own - i) % devices
        part, pull = jax.vjp(
            lambda q, k, v: attend(q, k, v, owner, fixed), q_BTHK, *keys
        )
        d_q, *d_keys = pull(merge.part_cotangents(whole, part, cotangents))
        return d_q, tuple(d_keys)

    def step(i, carry):
        keys, d_q, d_keys = carry
        following = _pass_on(keys, devices)
        d_q, d_keys = _add((d_q, d_keys), meet(i, keys))
        return following, d_q, _pass_on(d_keys, devices)

    keys = k_BSGK, v_BSGK
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q_BTHK, keys))
    keys, *totals = lax.fori_loop(0, devices - 1, step, (keys, *zeros))
    d_q, d_keys = _add(tuple(totals), meet(devices - 1, keys))
    d_keys = _pass_on(d_keys, devices)
    d_inputs = jax.tree.map(
        lambda d, x: d.astype(x.dtype), (d_q, *d_keys), (q_BTHK, k_BSGK, v_BSGK)
    )
    return *d_inputs, None


visit.defvjp(_forward, _backward)


def _pass_on(tree, devices):
    """To the next device, the last one's to the first."""
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    return lax.ppermute(tree, "context", pairs)


def _add(totals, parts):
    return jax.tree.map(jnp.add, totals, parts)
