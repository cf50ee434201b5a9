"""Hidden states to losses, without ever holding the logits of a whole row. Called by `step`."""

import jax
import jax.numpy as jnp

from bsa.parallel import mesh, pieces
from pallas_kernels import shapes


@jax.named_scope("loss")
def cross_entropy(
    hidden_BTD,
    embedding_VD,
    target_BT,
    chunk_tokens: int,
    placement: mesh.Placement = mesh.ALONE,
):
    """Next-token loss of every position, `chunk_tokens` of each row at a time; backward recomputes the logits.

    Args:
        hidden_BTD: the decoder's output; logits are its products with the embeddings, in float32.
        target_BT: int32 in [0, V).
        chunk_tokens: tokens of a row whose logits exist at the same time, on each device that holds part of it.
    Returns:
        nll_BT: float32, nats; and hit_BT: bool, whether the target was the likeliest token.
    """
    shapes.check(hidden_BTD=hidden_BTD, embedding_VD=embedding_VD, target_BT=target_BT)
    embedding_VD = embedding_VD.astype(hidden_BTD.dtype)

    def of_piece(hidden_BTD, target_BT):
        logit_BTV = jnp.einsum(
            "...td,vd->...tv",
            hidden_BTD,
            embedding_VD,
            preferred_element_type=jnp.float32,
        )
        chosen = jnp.take_along_axis(logit_BTV, target_BT[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logit_BTV, axis=-1) - chosen
        return nll, jnp.argmax(logit_BTV, axis=-1) == target_BT

    return pieces.map_tokens(of_piece, (hidden_BTD, target_BT), chunk_tokens, placement)
