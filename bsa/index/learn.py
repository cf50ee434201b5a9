"""Scores through which gradients flow, so that queries and keys learn to be found. Called by `bsa.model.attention`.

Choosing blocks has no gradient. Two ways around it: the score of a chosen block joins its logits, or takes the place of
their mass, so the loss reaches it (`block_bias`, in decoding too); or scores are taught where attention would fall if it
read everything (`divergence`). What is learned are the queries and keys, how keys that stand together are mixed before
they are digested (`mix`), and where spans begin.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bsa.index import digest, settings, turn
from pallas_kernels import selection, shapes

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples fall evenly between 0 and 1, and in step with no length of blocks."""


def list_bias(
    q_BTHK,
    k_BSGK,
    lists: selection.BlockSelection,
    open_blocks,
    index: settings.IndexSettings,
    *,
    scale: float,
    weight: float,
    attending=None,
    mass_weight: float = 0.0,
):
    """`block_bias` of whole rows, `route_tokens` of each at a time.

    Args:
        open_blocks: low_BT and high_BT, as `LocalView.open_blocks`.
        attending: q_BTHK and k_BSGK of the attention, H = G; needed for `mass_weight` only.
    Returns:
        bias_BGTJ: float32, as the kernel wants it. Differentiable with respect to queries and keys.
    """
    sizes = shapes.check(
        q_BTHK=q_BTHK, k_BSGK=k_BSGK, block_id_BGQJ=lists.block_id_BGQJ
    )
    B, T, G, Q, J = (sizes[letter] for letter in "BTGQJ")
    point_BGNRK, log_count_BGNR = _digests(k_BSGK, index)
    block = lists.query_block
    piece = min(index.route_tokens // block, Q)

    def pieces(x, axis):
        pad = [(0, -Q % piece if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad, mode="edge")
        x = x.reshape(*x.shape[:axis], -1, piece, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def by_lists(q_BTHK):
        q_BQTGHK = q_BTHK.reshape(B, Q, block, G, -1, q_BTHK.shape[-1])
        return pieces(q_BQTGHK.transpose(0, 3, 1, 2, 4, 5), 2)

    low_BQT, high_BQT = (x.reshape(B, Q, block) for x in open_blocks)
    attending_q, attended_BGNCK = None, None
    if mass_weight:
        attending_q = by_lists(attending[0])
        attended_BGNCK = _by_blocks(attending[1], index.C)

    @jax.checkpoint
    def of_piece(arguments):
        q_BGQTHK, id_BGQJ, low_BQT, high_BQT, attending_BGQTHK = arguments
        take = jax.vmap(jax.vmap(lambda x, place: x[place]))
        place_BGQJ = jnp.maximum(id_BGQJ, 0)
        attending = None
        if mass_weight:
            attending = attending_BGQTHK, take(attended_BGNCK, place_BGQJ)
        return block_bias(
            q_BGQTHK,
            (take(point_BGNRK, place_BGQJ), take(log_count_BGNR, place_BGQJ)),
            id_BGQJ,
            (low_BQT, high_BQT),
            index,
            scale=scale,
            weight=weight,
            attending=attending,
            mass_weight=mass_weight,
        )

    arguments = by_lists(q_BTHK), pieces(lists.block_id_BGQJ, 2)
    arguments += pieces(low_BQT, 1), pieces(high_BQT, 1), attending_q
    bias_BGQTJ = jnp.moveaxis(lax.map(of_piece, arguments), 0, 2)
    return bias_BGQTJ.reshape(B, G, -1, block, J)[:, :, :Q].reshape(B, G, T, J)


def block_bias(
    q_BGQTHK,
    digests,
    block_id_BGQJ,
    open_blocks,
    index: settings.IndexSettings,
    *,
    scale: float,
    weight: float,
    attending=None,
    mass_weight: float = 0.0,
):
    """What joins the logits of each listed block: `weight` times the logit that its digest promises a token, less
    `mass_weight` times the one that its tokens have, the log of their mean mass.

    With both weights 1 a block's mass is what its score promises: tokens share a block by their own softmax, and blocks
    and local tokens compete by the blocks' scores (grouped softmax, Landmark, arXiv 2305.16300).

    Args:
        q_BGQTHK: queries of query blocks of T tokens, H to a key/value head; their mean scores.
        digests: point_BGQJRK and log_count_BGQJR of the listed blocks, as `digest.summarise` has them.
        open_blocks: low_BQT and high_BQT, what each token may choose; others, which it reads anyway, get 0.
        attending: q_BGQTHK and k_BGQJCK of the attention, one head a list; needed for `mass_weight` only.
    Returns:
        bias_BGQTJ: float32, nats.
    Raises:
        ValueError: bookmarks are of spans, or kept with fewer bits: they would not be what training differentiates.
    """
    if index.span_blocks > 1 or index.store != "float32":
        raise ValueError(
            f"model.score_weight needs each block's own points: set index.span_blocks={index.span_blocks} to 1 and "
            f"index.store={index.store!r} to 'float32'"
        )
    low_BQT, high_BQT = open_blocks
    q_BGQTHK = q_BGQTHK.astype(jnp.float32) * scale
    query_BGQTK = digest.widen(index.digest, q_BGQTHK).mean(4)

    def of_list(q_TK, point_JRK, log_count_JR):
        return digest.score(index.digest, q_TK, point_JRK, log_count_JR)

    score_BGQTJ = jax.vmap(jax.vmap(jax.vmap(of_list)))(query_BGQTK, *digests)
    id_BGQTJ = block_id_BGQJ[:, :, :, None]
    chosen = (id_BGQTJ >= low_BQT[:, None, ..., None]) & (
        id_BGQTJ < high_BQT[:, None, ..., None]
    )
    bias_BGQTJ = weight * (score_BGQTJ - np.log(index.C))
    if mass_weight:
        q_BGQTHK, k_BGQJCK = attending
        logit_BGQTJC = scale * jnp.einsum(
            "BGQTHK,BGQJCK->BGQTJC",
            q_BGQTHK,
            k_BGQJCK,
            preferred_element_type=jnp.float32,
        )
        mass_BGQTJ = jax.nn.logsumexp(logit_BGQTJC, axis=-1)
        bias_BGQTJ -= mass_weight * (mass_BGQTJ - np.log(index.C))
    return jnp.where(chosen, bias_BGQTJ, 0.0)


def divergence(
    attending,
    sought,
    start_BT,
    open_blocks,
    index: settings.IndexSettings,
    *,
    scale: float,
    num_rows: int,
    spans: turn.Learned | None = None,
):
    """How far scores are from where attention falls: KL(attention's mass of blocks || softmax of their scores).

    Mass is that of dense attention, over the blocks that a token may choose, the sum over a group's heads; no gradient
    flows through it (the lightning indexer's loss, DeepSeek-V3.2-Exp). Linear in tokens: few of them are asked.

    Args:
        attending: q_BTHK and k_BSGK, which say where attention falls.
        sought: the same or others, of the index: they are taught.
        start_BT: int32, place in the row where each token's document begins.
        open_blocks: low_BT and high_BT, as `LocalView.open_blocks`.
        num_rows: tokens of each row that are asked, spread evenly.
        spans: learned ones, whose confidence joins the scores of their blocks, and is taught.
    Returns:
        float32, nats: the mean over tokens that may choose between blocks, and over groups. 0 if there are none.
    """
    q_BTHK, k_BSGK = lax.stop_gradient(attending)
    sought_BTHK, sought_BSGK = sought
    shapes.check(q_BTHK=sought_BTHK, k_BSGK=sought_BSGK)
    T, S = (
        shapes.check(q_BTHK=q_BTHK, k_BSGK=k_BSGK, start_BT=start_BT)[letter]
        for letter in "TS"
    )
    row = np.arange(num_rows)
    place_T = ((row + row * GOLDEN % 1) * T / num_rows).astype(np.int32)
    low_BT, high_BT, start_BT = (x[:, place_T] for x in (*open_blocks, start_BT))
    block_N = jnp.arange(S // index.C)
    is_open = (block_N >= low_BT[..., None]) & (block_N < high_BT[..., None])
    is_open = is_open[:, None]

    q_BGTHK = _by_groups(q_BTHK[:, place_T], k_BSGK, scale)
    share_BGTN = _mass(q_BGTHK, k_BSGK, start_BT, place_T, index.C) * is_open
    total = share_BGTN.sum(-1, keepdims=True)
    share_BGTN /= jnp.where(total > 0, total, 1)
    log_share = jnp.log(jnp.where(share_BGTN > 0, share_BGTN, 1))

    q_BGTHK = _by_groups(sought_BTHK[:, place_T], sought_BSGK, scale)
    q_BGTK = digest.widen(index.digest, q_BGTHK).mean(3)
    of_row = jax.vmap(jax.vmap(lambda *x: digest.score(index.digest, *x)))
    score_BGTN = of_row(q_BGTK, *_digests(sought_BSGK, index))
    if spans is not None:
        begin_BGN = jnp.maximum(spans.begin_BGM, 0)
        turn_BGN = jnp.take_along_axis(spans.turn_BGM, begin_BGN, axis=2)
        score_BGTN += turn.log_confidence(turn_BGN)[:, :, None]
    log_guess = jax.nn.log_softmax(jnp.where(is_open, score_BGTN, -1e30), axis=-1)
    gap_BGT = jnp.where(is_open, share_BGTN * (log_share - log_guess), 0).sum(-1)
    chooses_BT = high_BT - low_BT > 1
    num_rows = jnp.maximum(chooses_BT.sum() * k_BSGK.shape[2], 1)
    return (gap_BGT * chooses_BT[:, None]).sum() / num_rows


def mix(k_BSGK, earlier_BSGK, place_BS, filter_CGK, key_block: int):
    """Keys to which a short convolution adds what the few before them say: digests of these are learned summaries.

    It ends where the block begins, so that a bookmark is still of its own tokens alone (FlashMoBA, arXiv 2511.11571,
    has a convolution of keys that crosses blocks).

    Args:
        earlier_BSGK: keys of the C - 1 tokens before these; what stands for tokens before the row means nothing.
        place_BS: int32, places of the tokens in the row.
        filter_CGK: C weights a channel, that of the key itself first.
    """
    taps, num = filter_CGK.shape[0], k_BSGK.shape[1]
    keys = jnp.concatenate([earlier_BSGK, k_BSGK], axis=1)
    total = jnp.zeros_like(k_BSGK)
    for back, weight_GK in enumerate(filter_CGK.astype(k_BSGK.dtype)):
        begin = taps - 1 - back
        is_inside_BS = place_BS % key_block >= back
        said = weight_GK * keys[:, begin : begin + num]
        total += jnp.where(is_inside_BS[..., None, None], said, 0)
    return k_BSGK + jax.nn.silu(total)


def _by_groups(q_BTHK, k_BSGK, scale):
    """Scaled float32 queries [B, G, T, H/G, K]."""
    B, T, _, K = q_BTHK.shape
    q_BTGHK = q_BTHK.reshape(B, T, k_BSGK.shape[2], -1, K).astype(jnp.float32)
    return q_BTGHK.swapaxes(1, 2) * scale


def _mass(q_BGTHK, k_BSGK, start_BT, place_T, key_block):
    """Share of the attention that falls on each block, the sum over heads: [B, G, T, N]."""
    k_BSGK = k_BSGK.astype(jnp.float32)
    logit_BGTHS = jnp.einsum("BGTHK,BSGK->BGTHS", q_BGTHK, k_BSGK)
    key_S = jnp.arange(k_BSGK.shape[1])
    sees_BTS = (key_S <= place_T[:, None]) & (key_S >= start_BT[..., None])
    weight = jax.nn.softmax(
        jnp.where(sees_BTS[:, None, :, None], logit_BGTHS, -jnp.inf), axis=-1
    )
    return weight.sum(3).reshape(*weight.shape[:3], -1, key_block).sum(-1)


def _digests(k_BSGK, index):
    """Digests of all blocks, with gradients."""
    point_BGNRK, log_count_BGNR, _ = digest.summarise(
        _by_blocks(k_BSGK, index.C), index
    )
    return point_BGNRK, log_count_BGNR


def _by_blocks(k_BSGK, key_block):
    """Keys as k_BGNCK."""
    B, _, G, K = k_BSGK.shape
    return k_BSGK.reshape(B, -1, key_block, G, K).transpose(0, 3, 1, 2, 4)
