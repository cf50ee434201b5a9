"""The oracle: attention over a dense [B, H, T, S] mask, float32, differentiated by JAX.

Called by tests and by anyone who doubts a kernel. Memory is quadratic: small inputs only.
"""

import jax
import jax.numpy as jnp


def attend(q_BTHK, k_BSGK, v_BSGK, selection, bias_BGTJ, segment_ids, options):
    """Computes `dispatch.block_sparse_attention` in the most obvious way."""
    (B, T, H, _), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    q_BTHK, k_BSHK, v_BSHK = (
        jnp.repeat(x.astype(jnp.float32), H // x.shape[2], axis=2)
        for x in (q_BTHK, k_BSGK, v_BSGK)
    )
    s_BHTS = options.scale * jnp.einsum(
        "BTHK,BSHK->BHTS", q_BTHK, k_BSHK, precision="highest"
    )
    ids = (
        jnp.arange(B)[:, None, None, None],
        jnp.arange(H)[:, None, None],
        jnp.arange(T)[:, None] + jnp.reshape(options.query_offset, (-1, 1, 1, 1)),
        jnp.arange(S) + options.key_offset,
    )
    read_BGTS, bias_BGTS = _expand(selection, bias_BGTJ, T, S)
    read_BHTS = jnp.repeat(read_BGTS, H // G, axis=1)
    if options.causal:
        read_BHTS &= ids[3] <= ids[2]
    if segment_ids is not None:
        query_BT, key_BS = segment_ids
        read_BHTS &= query_BT[:, None, :, None] == key_BS[:, None, None, :]
    if options.mask_mod is not None:
        read_BHTS &= options.mask_mod(*ids)
    if options.score_mod is not None:
        s_BHTS = options.score_mod(s_BHTS, *ids)
    s_BHTS += jnp.repeat(bias_BGTS, H // G, axis=1)
    read_BHTS &= s_BHTS > -jnp.inf

    # A row that reads nothing gets harmless logits, so that no NaN reaches its gradients.
    empty_BHT1 = ~read_BHTS.any(-1, keepdims=True)
    s_BHTS = jnp.where(empty_BHT1, 0.0, jnp.where(read_BHTS, s_BHTS, -jnp.inf))
    p_BHTS = jnp.where(empty_BHT1, 0.0, jax.nn.softmax(s_BHTS))
    lse_BHT = jnp.where(empty_BHT1[..., 0], -jnp.inf, jax.nn.logsumexp(s_BHTS, axis=-1))
    out_BTHK = jnp.einsum("BHTS,BSHK->BTHK", p_BHTS, v_BSHK, precision="highest")
    return out_BTHK, lse_BHT


def _expand(selection, bias_BGTJ, T, S):
    """Spreads lists over tokens and keys: who may read what, and with which bias."""
    query_block, key_block = selection.query_block, selection.key_block
    J = selection.block_id_BGQJ.shape[-1]
    N = -(-S // key_block)

    def per_token(x_BGQJ):
        return jnp.repeat(x_BGQJ, query_block, axis=2)[:, :, :T]

    listed_BGTJ = per_token(jnp.arange(J) < selection.count_BGQ[..., None])
    if selection.token_mask_BGQJ is not None:
        bit_T1 = (jnp.arange(T) % query_block).astype(jnp.uint32)[:, None]
        listed_BGTJ &= (per_token(selection.token_mask_BGQJ) >> bit_T1) & 1 == 1
    block_id_BGTJ = per_token(selection.block_id_BGQJ)
    chosen_BGTJN = listed_BGTJ[..., None] & (block_id_BGTJ[..., None] == jnp.arange(N))
    bias_BGTN = jnp.zeros(())
    if bias_BGTJ is not None:
        bias_BGTN = jnp.where(chosen_BGTJN, bias_BGTJ[..., None], 0.0).sum(axis=3)
    read_BGTN = chosen_BGTJN.any(axis=3)
    return tuple(
        jnp.repeat(jnp.broadcast_to(x, read_BGTN.shape), key_block, axis=-1)[..., :S]
        for x in (read_BGTN, bias_BGTN)
    )
