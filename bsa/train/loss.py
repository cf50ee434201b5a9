"""Hidden states to losses, without ever holding the logits of a whole row. Called by `step`."""

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


def cross_entropy(hidden_BTD, embedding_VD, target_BT, chunk_tokens: int):
    """Next-token loss of every position, `chunk_tokens` of each row at a time; backward recomputes the logits.

    Args:
        hidden_BTD: the decoder's output; logits are its products with the embeddings, in float32.
        target_BT: int32 in [0, V).
        chunk_tokens: tokens of a row whose logits exist at the same time.
    Returns:
        nll_BT: float32, nats; and hit_BT: bool, whether the target was the likeliest token.
    """
    sizes = shapes.check(
        hidden_BTD=hidden_BTD, embedding_VD=embedding_VD, target_BT=target_BT
    )
    B, T = sizes["B"], sizes["T"]
    piece = min(chunk_tokens, T)
    pad = -T % piece
    embedding_VD = embedding_VD.astype(hidden_BTD.dtype)

    def pieces(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, piece, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_piece(arguments):
        hidden, target = arguments
        logit_BTV = jnp.einsum(
            "btd,vd->btv", hidden, embedding_VD, preferred_element_type=jnp.float32
        )
        chosen = jnp.take_along_axis(logit_BTV, target[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logit_BTV, axis=-1) - chosen
        return nll, jnp.argmax(logit_BTV, axis=-1) == target

    nll, hit = jax.lax.map(of_piece, (pieces(hidden_BTD), pieces(target_BT)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, T + pad)[:, :T] for x in (nll, hit))
