"""Dense attention by the library's kernels, a piece of the queries at a time. Called by `attention`."""

import jax
import jax.numpy as jnp

from pallas_kernels import shapes

QUERY_TOKENS = 1024
"""Queries of a dense layer that are scored at once, so that memory stays linear in tokens."""

SPANS = 8
"""Parts of a row, each of which reads keys up to its own end: 7/16 of the masked work is left out."""


@jax.named_scope("dense")
def attend(q_BTHK, k_BSGK, v_BSGK, segment_id_BT, scale: float, *, key_tokens: int = 1):
    """Causal attention to every earlier token of the same document, a piece of the queries at a time.

    Args:
        key_tokens: that each key stands for; it is read from the last of them on, and only if all are of one document.
    Returns:
        out_BTHK; means nothing for a token that may read no key.
    """
    T = shapes.check(q_BTHK=q_BTHK, segment_id_BT=segment_id_BT)["T"]
    shapes.check(k_BSGK=k_BSGK, v_BSGK=v_BSGK)
    first_BS, last_BS = (segment_id_BT[:, at::key_tokens] for at in (0, key_tokens - 1))
    segment_id_BS = jnp.where(first_BS == last_BS, last_BS, -1)
    piece = min(QUERY_TOKENS, T)
    span = -(-T // (piece * SPANS)) * piece
    outs = []
    for begin in range(0, T, span):
        end = min(begin + span, T)
        seen = max(end // key_tokens, 1)
        rows = q_BTHK[:, begin:end], segment_id_BT[:, begin:end]
        keys = k_BSGK[:, :seen], v_BSGK[:, :seen], segment_id_BS[:, :seen]
        outs.append(_attend_span(rows, keys, begin, piece, scale, key_tokens))
    return jnp.concatenate(outs, axis=1)


def _attend_span(rows, keys, begin, piece, scale, key_tokens):
    """The same for T tokens from `begin` on."""
    (q_BTHK, segment_id_BT), (k_BSGK, v_BSGK, segment_id_BS) = rows, keys
    (B, T), S = q_BTHK.shape[:2], k_BSGK.shape[1]
    pad = -T % piece
    implementation = _library_implementation(q_BTHK.dtype, S)

    def pieces(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, piece, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_piece(arguments):
        q, segment_id, place = arguments
        sees = place[:, :, None] >= (jnp.arange(S) + 1) * key_tokens - 1
        sees &= segment_id[:, :, None] == segment_id_BS[:, None]
        # cuDNN's softmax of no key at all is NaN, and so are gradients then, whatever becomes of the output.
        sees |= ~sees.any(-1, keepdims=True)
        return jax.nn.dot_product_attention(
            *(q, k_BSGK, v_BSGK),
            mask=sees[:, None],
            scale=scale,
            implementation=implementation,
        )

    place_BT = jnp.broadcast_to(jnp.arange(begin, begin + T), (B, T))
    out = jax.lax.map(of_piece, jax.tree.map(pieces, (q_BTHK, segment_id_BT, place_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, T + pad, *q_BTHK.shape[2:])[:, :T]


def _library_implementation(dtype, num_keys):
    """cuDNN's kernel where it takes such keys, since XLA's writes every logit; else XLA's."""
    takes = dtype in (jnp.bfloat16, jnp.float16) and num_keys % 2 == 0
    is_nvidia = jax.devices()[0].device_kind.startswith("NVIDIA")
    return "cudnn" if takes and is_nvidia else "xla"
