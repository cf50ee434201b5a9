"""Attention over some of the keys at a time: partial results into the whole, and its cotangents back to the parts.

Each part is (out, lse) over its own keys, as `block_sparse_attention` returns it; a query that reads none of them has
out 0 and lse -inf. Called by `ring` and `exchange`.
"""

import jax.numpy as jnp


def nothing(q_BTHK):
    """The result over no keys: float32 out_BTHK and lse_BHT."""
    B, T, H, _ = q_BTHK.shape
    return (
        jnp.zeros(q_BTHK.shape, jnp.float32),
        jnp.full((B, H, T), -jnp.inf, jnp.float32),
    )


def merge(whole, part):
    """The result over the keys of both: out_BTHK in float32, and lse_BHT."""
    (out_BTHK, lse_BHT), (part_BTHK, part_lse_BHT) = whole, part
    both_BHT = jnp.logaddexp(lse_BHT, part_lse_BHT)
    out_BTHK = _share(lse_BHT, both_BHT) * out_BTHK.astype(jnp.float32)
    out_BTHK += _share(part_lse_BHT, both_BHT) * part_BTHK.astype(jnp.float32)
    return out_BTHK, both_BHT


def part_cotangents(whole, part, cotangents):
    """What a part's out and lse get of the whole's cotangents.

    With w = exp(part_lse - lse), out is the sum over parts of w * part, so d_part = w * d_out and
    d_part_lse = w * (d_out . (part - out) + d_lse).
    """
    share_BTH1, d_part_lse_BHT = part_share(whole, part, cotangents)
    d_part_BTHK = (share_BTH1 * cotangents[0]).astype(part[0].dtype)
    return d_part_BTHK, d_part_lse_BHT


def part_share(whole, part, cotangents):
    """w and d_part_lse of `part_cotangents`, which are small."""
    (out_BTHK, lse_BHT), (part_BTHK, part_lse_BHT) = whole, part
    d_out_BTHK, d_lse_BHT = cotangents
    share_BTH1 = _share(part_lse_BHT, lse_BHT)
    gap_BTHK = part_BTHK.astype(jnp.float32) - out_BTHK
    d_lse_BTH = (d_out_BTHK * gap_BTHK).sum(-1) + d_lse_BHT.swapaxes(1, 2)
    return share_BTH1, (share_BTH1[..., 0] * d_lse_BTH).swapaxes(1, 2)


def _share(part_lse_BHT, lse_BHT):
    """exp(part_lse - lse), 0 where the part has no keys; as BTH1."""
    has_keys = part_lse_BHT > -jnp.inf
    gap_BHT = jnp.where(has_keys, part_lse_BHT - lse_BHT, -jnp.inf)
    return jnp.exp(gap_BHT).swapaxes(1, 2)[..., None]
