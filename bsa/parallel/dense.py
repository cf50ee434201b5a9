"""Dense causal attention over shards of a row, by the ring and in zigzag order. Called by `attend`.

Later queries read more, so a contiguous split would leave the first device idle. Of twice as many halves as devices,
device i works on the i-th and on the i-th from the end: each meeting of two devices is then half of all pairs, and the
same work for all (Brandon et al., 2023, in Llama 3's form).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bsa.parallel import merge, ring

LOGIT_BYTES = 2**28
"""Float32 logits that exist at the same time. The library's attention returns lse in the keys' dtype, too coarse to merge
by in bfloat16, and without gradient; so the maths stands here."""


def attend_shard(q_BTHK, k_BSGK, v_BSGK, segment_id_BT, *, devices: int, scale: float):
    """Causal attention to every earlier token of the same document, on any device of the row.

    Raises:
        ValueError: a shard has an odd number of tokens.
    """
    T = q_BTHK.shape[1]
    if T % 2:
        raise ValueError(
            f"T={T} tokens a device are odd: dense attention deals out halves; make T a multiple of {2 * devices}"
        )
    segment_id_BS = lax.all_gather(segment_id_BT, "context", axis=1, tiled=True)
    q, k, v = (_deal(x, devices) for x in (q_BTHK, k_BSGK, v_BSGK))
    meet = functools.partial(_meet, devices=devices, scale=scale)
    out_BTHK, _ = ring.visit(meet, devices, q, k, v, segment_id_BS)
    return _collect(out_BTHK, devices)


def _deal(x_BT, devices):
    """Two consecutive halves of a device to its early and its late one."""
    even, odd = jnp.split(x_BT, 2, axis=1)
    even = lax.ppermute(even, "context", _destinations(devices, 0))
    odd = lax.ppermute(odd, "context", _destinations(devices, 1))
    is_even = lax.axis_index("context") % 2 == 0
    early, late = jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)
    return jnp.concatenate([early, late], axis=1)


def _collect(x_BT, devices):
    """Undoes `_deal`."""
    early, late = jnp.split(x_BT, 2, axis=1)
    is_even = lax.axis_index("context") % 2 == 0
    parts = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    back = [
        lax.ppermute(part, "context", [(b, a) for a, b in _destinations(devices, i)])
        for i, part in enumerate(parts)
    ]
    return jnp.concatenate(back, axis=1)


def _destinations(devices, parity):
    """(from, to) of each device's first half (parity 0) or second one."""
    halves = [2 * device + parity for device in range(devices)]
    return [(half // 2, min(half, 2 * devices - 1 - half)) for half in halves]


def _meet(q_BTHK, k_BSGK, v_BSGK, owner, segment_id_BS, *, devices, scale):
    """What this device's halves read of a visitor's: a half of the pairs, but of its own the lower triangle."""
    own, half = lax.axis_index("context"), q_BTHK.shape[1] // 2

    def places(device):
        starts = jnp.stack([device, 2 * devices - 1 - device]) * half
        return (starts[:, None] + jnp.arange(half, dtype=jnp.int32)).reshape(-1)

    def attend(queries, keys):
        """Over slices of both."""
        q_place, k_place = places(own)[queries], places(owner)[keys]
        return _attend(
            (q_BTHK[:, queries], segment_id_BS[:, q_place], q_place),
            (k_BSGK[:, keys], v_BSGK[:, keys], segment_id_BS[:, k_place], k_place),
            scale,
        )

    everything, early, late = slice(None), slice(None, half), slice(half, None)

    def late_queries():
        none, part = merge.nothing(q_BTHK[:, early]), attend(late, everything)
        out_BTHK = jnp.concatenate([none[0].astype(part[0].dtype), part[0]], axis=1)
        return out_BTHK, jnp.concatenate([none[1], part[1]], axis=2)

    return lax.switch(
        jnp.sign(owner - own) + 1,
        [
            lambda: attend(everything, early),
            lambda: attend(everything, everything),
            late_queries,
        ],
    )


def _attend(queries, keys, scale):
    """Masked softmax attention, a piece of the queries at a time; backward recomputes the logits."""
    q_BTHK, q_segment_BT, q_place_T = queries
    k_BSGK, v_BSGK, k_segment_BS, k_place_S = keys
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    piece = max(1, min(T, LOGIT_BYTES // (4 * B * H * S)))
    pad = -T % piece

    def pieces(x, axis):
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], -1, piece, *x.shape[axis + 1 :]), axis, 0
        )

    @jax.checkpoint
    def of_piece(arguments):
        q, segment, place = arguments
        q = q.reshape(B, piece, G, H // G, K)
        logit = scale * jnp.einsum(
            "btghk,bsgk->bghts", q, k_BSGK, preferred_element_type=jnp.float32
        )
        sees = (place[:, None] >= k_place_S) & (
            segment[..., None] == k_segment_BS[:, None]
        )
        logit = jnp.where(sees[:, None, None], logit, -jnp.inf)
        top = lax.stop_gradient(logit.max(-1, keepdims=True))
        weight = jnp.exp(logit - jnp.where(top > -jnp.inf, top, 0))
        total = weight.sum(-1)
        out = jnp.einsum(
            "bghts,bsgk->btghk",
            weight.astype(v_BSGK.dtype),
            v_BSGK,
            preferred_element_type=jnp.float32,
        )
        seen = jnp.where(total > 0, total, 1)
        out /= jnp.moveaxis(seen, 3, 1)[..., None]
        lse = jnp.where(
            total > 0,
            jnp.where(top > -jnp.inf, top, 0)[..., 0] + jnp.log(seen),
            -jnp.inf,
        )
        return out.astype(q_BTHK.dtype).reshape(B, piece, H, K), lse.reshape(
            B, H, piece
        )

    rows = pieces(q_BTHK, 1), pieces(q_segment_BT, 1), pieces(q_place_T, 0)
    out, lse = lax.map(of_piece, rows)
    out_BTHK = jnp.moveaxis(out, 0, 1).reshape(B, T + pad, H, K)[:, :T]
    return out_BTHK, jnp.moveaxis(lse, 0, 2).reshape(B, H, T + pad)[:, :, :T]
