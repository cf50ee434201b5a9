"""Where a text turns to something else, as a loss teaches it: what learned spans begin by. Called by all that makes spans.

Each block's mean key is compared with that of the block before it, by projections. H-Net (arXiv 2507.07955) compares hidden
states; of these nothing is left where an index grows, of keys the digests are, and keys are what is searched.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import digest

LEAST_CONFIDENCE = 0.05
"""Of the beginning of a span that began because the one before it was as long as may be."""


class Boundary(NamedTuple):
    """What a block and the one before it are compared by, float32: rows of a matrix for each key/value head."""

    before_GKK: jax.Array
    after_GKK: jax.Array


class Learned(NamedTuple):
    """Learned spans as losses see them.

    Attributes:
        begin_BGM: int32, where the span of each block begins; -1 where it is not known yet.
        turn_BGM: as `span.Spans` has it, with gradients to the `Boundary`.
    """

    begin_BGM: jax.Array
    turn_BGM: jax.Array


def find(digests, block_id_N, start_BN, boundary: Boundary | None, index):
    """Probability that a span begins at each block, (1 - cos(before, after)) / 2 of H-Net (arXiv 2507.07955).

    1 where a document's spans begin anew, and next to NaN. The first block has nothing before it in these arrays: what is
    returned for it means nothing elsewhere.

    Args:
        digests: point_BGNRK and log_count_BGNR of single blocks.
        block_id_N, start_BN: as for `span.lengths`.
    Returns:
        turn_BGN: float32, to rounding the same however many blocks there are; None unless spans are learned. Gradients
            flow to the boundary only.
    Raises:
        ValueError: there is no boundary.
    """
    if index.spans != "learned":
        return None
    if boundary is None:
        raise ValueError(
            "index.spans='learned' needs the projections that a layer trained with it has; set it to 'alike'"
        )
    mean_BGNK = lax.stop_gradient(digest.centre(index.digest, *digests))

    def project(weight_GKK):
        x_BGNK = jnp.einsum(
            "GDK,BGNK->BGND", weight_GKK, mean_BGNK, precision=lax.Precision.HIGHEST
        )
        square_BGN1 = jnp.square(x_BGNK).sum(-1, keepdims=True)
        return x_BGNK / jnp.sqrt(jnp.maximum(square_BGN1, 1e-30))

    before_BGNK, after_BGNK = map(project, boundary)
    before_BGNK = jnp.roll(before_BGNK, 1, axis=2)
    turn_BGN = (1 - (before_BGNK * after_BGNK).sum(-1)) / 2
    is_cut_BN = is_cut(block_id_N, start_BN, index)
    return jnp.where(is_cut_BN[:, None] | jnp.isnan(turn_BGN), 1, turn_BGN)


def log_confidence(turn):
    """What joins the score of a span that begins where the text turns so much: nats, natural log."""
    return jnp.log(jnp.maximum(turn, LEAST_CONFIDENCE))


def ratio(spans: Learned, mean_blocks: float):
    """Loss that pulls the mean length of spans to `mean_blocks`, and what that length is.

    H-Net's ratio loss, but of the spans that there are, whatever cut them: the loss pulls turns up where fewer than one
    block in `mean_blocks` begins a span, down where more do, and has no gradient where just so many do.

    Returns:
        float32 scalars: the loss, the mean over heads, with gradients to the boundary; and blocks, the mean over heads.
    """
    begin_BGM, turn_BGM = spans
    is_known_BGM = begin_BGM >= 0
    num_known_G = jnp.maximum(is_known_BGM.sum((0, 2)), 1)
    begins_BGM = begin_BGM == jnp.arange(begin_BGM.shape[2])
    share_G = begins_BGM.sum((0, 2)) / num_known_G
    turn_G = jnp.where(is_known_BGM, turn_BGM, 0).sum((0, 2)) / num_known_G
    apart_G = (1 - share_G) * (1 - turn_G)
    loss_G = (mean_blocks - 1) * share_G * turn_G + apart_G
    loss = mean_blocks / (mean_blocks - 1) * loss_G.mean()
    return loss, (1 / jnp.maximum(share_G, 1 / num_known_G)).mean()


def is_cut(block_id_N, start_BN, index):
    """Where a document's spans begin anew, so that no span goes on: bool[B, N]."""
    first_BN = start_BN // index.C + index.sink_tokens // index.C
    return block_id_N <= jnp.maximum(first_BN, -(-start_BN // index.C))
