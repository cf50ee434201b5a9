"""The kinds of attention layers, as functions of queries, keys, values and where documents lie. Called by `layers`.

`d` reads everything before it through the library's dense attention; `s` (the last tokens, exactly), `w` (window in whole
blocks, and sinks), `c` (chunks) and `b` (bookmarks) make a `BlockSelection` and read it through the block-sparse kernel. `f`
follows: it reads what the bookmark layer before it selected, a head what the head of the same number did, and has no index
(IndexCache, arXiv 2603.12201).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bsa.index import learn, local, metrics
from bsa.model import settings
from bsa.parallel import attend as attend_lib
from bsa.parallel import mesh, select
from pallas_kernels import selection, shapes

DENSE_QUERY_TOKENS = 1024
"""Queries of a dense layer that are scored at once, so that memory stays linear in tokens."""

DENSE_SPANS = 8
"""Parts of a row, each of which reads keys up to its own end: 7/16 of the masked work is left out."""

FOLLOWED = "followed"
"""What a bookmark layer hands on to those that follow it, `Followed`."""

SAVED = "selection"
"""Name under which lists are kept for backward, so that rematerialised layers do not route twice."""


class Heads(NamedTuple):
    """What a layer compares and sums.

    Attributes:
        sought: queries and keys by which the index is built and searched: attention's own, or others with a query for
            each key/value head. Their logits are scaled as attention's are.
        filter_CGK: how those keys are mixed first, see `learn.mix`; None: not at all.
    """

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    sought: tuple[jax.Array, jax.Array]
    filter_CGK: jax.Array | None = None


class Followed(NamedTuple):
    """What layers of kind f have of the bookmark layer before them.

    Attributes:
        lists: they read what it selected.
        sought: queries and keys of its index, which their attention teaches too; None in decoding.
    """

    lists: selection.BlockSelection
    sought: tuple[jax.Array, jax.Array] | None


def attend(
    heads: Heads,
    segment_id_BT,
    position_BT,
    model: settings.ModelSettings,
    layer: int,
    followed: Followed | None = None,
    placement: mesh.Placement = mesh.ALONE,
):
    """Runs the attention of one letter of the pattern.

    Args:
        segment_id_BT: int32, documents of the row; no attention crosses them.
        position_BT: int32, tokens since the document's beginning.
        layer: index into the pattern.
        followed: of the bookmark layer before one of kind f; others make lists of their own.
        placement: devices that the arrays are split over.
    Returns:
        out_BTHK, and a dict of figures: `attended_tokens` (mean over tokens), for bookmark layers also
        `scored_nodes` (bookmarks and chapters, [B, T]), `union_tokens`, `refused_choices`, `selection_entropy`,
        `unread_bookmarks`, the lists as `selection`, and `followed`; if rows are taught, for them and those that follow
        `selection_divergence`.
    Raises:
        ValueError: selection is to be learned in rows that lie on several devices.
    """
    if heads.filter_CGK is not None:
        heads = _mix(heads, model)
    q_BTHK, k_BSGK, v_BSGK, sought, _ = heads
    kind, scale = model.pattern[layer], q_BTHK.shape[-1] ** -0.5
    if kind == "d":
        arrays = q_BTHK, k_BSGK, v_BSGK, segment_id_BT
        if placement.context == 1:
            out = dense(*arrays, scale)
        else:
            out = attend_lib.dense(*arrays, placement, scale=scale)
        return out, {"attended_tokens": position_BT.mean(dtype=jnp.float32) + 1}

    rules = {"scale": scale, "implementation": model.implementation}
    view, mask_mod = _view(position_BT, model, layer)
    if kind == "c":
        segment_id_BT = local.chunk_segments(position_BT, model.chunk_tokens)
    if kind == "b":
        (count_BGM, scored_BGT), lists, refused_BGQ = select.choose(
            *sought, view, model.index, placement, **rules
        )
    elif kind == "f":
        lists, sought = followed
        heads = heads._replace(sought=sought)
    else:
        lists, _ = select.read_locally(view, model.index, model.G, placement)
    if kind != "f":
        lists = checkpoint_name(lists, SAVED)
    bias_BGTJ, learned = _learn(heads, lists, view, model, layer, placement)
    out_BTHK = attend_lib.block_sparse_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        lists,
        segment_id_BT,
        placement,
        bias_BGTJ=bias_BGTJ,
        mask_mod=mask_mod,
        **rules,
    )
    figures = {
        "attended_tokens": _attended_tokens(layer, lists, view, position_BT, model)
    }
    figures |= learned
    if kind == "b":
        entropy, unread = metrics.bookmark_use(count_BGM, view)
        figures |= {
            "scored_nodes": scored_BGT.mean(1, dtype=jnp.float32),
            "union_tokens": lists.count_BGQ.mean(dtype=jnp.float32) * model.index.C,
            "refused_choices": refused_BGQ.mean(dtype=jnp.float32),
            "selection_entropy": entropy,
            "unread_bookmarks": unread,
            SAVED: lists,
            FOLLOWED: Followed(lists, sought),
        }
    return out_BTHK, figures


def _mix(heads, model):
    """Heads whose index sees keys as the filter mixes them."""
    query_BTGK, key_BSGK = heads.sought
    B, S = key_BSGK.shape[:2]
    earlier_BSGK = jnp.zeros_like(key_BSGK[:, : model.route_taps - 1])
    place_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    key_BSGK = learn.mix(
        key_BSGK, earlier_BSGK, place_BS, heads.filter_CGK, model.index.C
    )
    return heads._replace(sought=(query_BTGK, key_BSGK))


def _learn(heads, lists, view, model, layer, placement):
    """By what selection is learned: the bias of chosen blocks, and how far scores are from where attention would fall."""
    bias_BGTJ, figures, scale = None, {}, heads.q_BTHK.shape[-1] ** -0.5
    if model.pattern[layer] not in "bf":
        return bias_BGTJ, figures
    if model.score_weight and model.pattern[layer] == "b":
        bias_BGTJ = select.bias(
            *(*heads.sought, lists, view, model.index, placement),
            scale=scale,
            weight=model.score_weight,
        )
    if model.taught_rows:
        if placement.context > 1:
            raise ValueError(
                f"model.taught_rows={model.taught_rows} reads whole rows; set it to 0 or mesh.context=1"
            )
        figures["selection_divergence"] = learn.divergence(
            (heads.q_BTHK, heads.k_BSGK),
            heads.sought,
            view.start_BT,
            view.open_blocks,
            model.index,
            scale=scale,
            num_rows=min(model.taught_rows, heads.q_BTHK.shape[1]),
        )
    return bias_BGTJ, figures


@jax.named_scope("dense")
def dense(q_BTHK, k_BSGK, v_BSGK, segment_id_BT, scale: float):
    """Causal attention to every earlier token of the same document, a piece of the queries at a time."""
    T = shapes.check(
        q_BTHK=q_BTHK, k_BSGK=k_BSGK, v_BSGK=v_BSGK, segment_id_BT=segment_id_BT
    )["T"]
    piece = min(DENSE_QUERY_TOKENS, T)
    span = -(-T // (piece * DENSE_SPANS)) * piece
    outs = []
    for begin in range(0, T, span):
        end = min(begin + span, T)
        outs.append(
            _dense_span(
                q_BTHK[:, begin:end],
                k_BSGK[:, :end],
                v_BSGK[:, :end],
                segment_id_BT[:, :end],
                piece,
                scale,
            )
        )
    return jnp.concatenate(outs, axis=1)


def _dense_span(q_BTHK, k_BSGK, v_BSGK, segment_id_BS, piece, scale):
    """The same for the last T of S tokens."""
    (B, T), S = q_BTHK.shape[:2], k_BSGK.shape[1]
    pad = -T % piece
    implementation = _library_implementation(q_BTHK.dtype, S)

    def pieces(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, piece, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_piece(arguments):
        q, segment_id, place = arguments
        sees = place[:, :, None] >= jnp.arange(S)
        sees &= segment_id[:, :, None] == segment_id_BS[:, None]
        return jax.nn.dot_product_attention(
            *(q, k_BSGK, v_BSGK),
            mask=sees[:, None],
            scale=scale,
            implementation=implementation,
        )

    place_BT = jnp.broadcast_to(jnp.arange(S - T, S), (B, T))
    rows = (q_BTHK, segment_id_BS[:, S - T :], place_BT)
    out = jax.lax.map(of_piece, jax.tree.map(pieces, rows))
    return jnp.moveaxis(out, 0, 1).reshape(B, T + pad, *q_BTHK.shape[2:])[:, :T]


def _library_implementation(dtype, num_keys):
    """cuDNN's kernel where it takes such keys, since XLA's writes every logit; else XLA's."""
    takes = dtype in (jnp.bfloat16, jnp.float16) and num_keys % 2 == 0
    is_nvidia = jax.devices()[0].device_kind.startswith("NVIDIA")
    return "cudnn" if takes and is_nvidia else "xla"


def _view(position_BT, model, layer):
    """What tokens of one letter's layers read anyway, and the mask that cuts its blocks, or None."""
    if model.pattern[layer] == "c":
        return local.chunk(position_BT, model.chunk_tokens, model.index.C), None
    if model.pattern[layer] == "s":
        return _sliding(position_BT, model.window_tokens[layer], model.index)
    view = local.window(
        position_BT,
        window_tokens=model.window_tokens[layer],
        sink_tokens=model.index.sink_tokens,
        key_block=model.index.C,
    )
    return view, None


def _sliding(position_BT, window_tokens, index):
    """The blocks that hold the last `window_tokens` tokens, the token itself among them, and the mask that cuts them."""
    blocks = -(-(window_tokens - 1) // index.C) + 1
    view = local.window(
        position_BT,
        window_tokens=blocks * index.C,
        sink_tokens=0,
        key_block=index.C,
    )
    return view, lambda b, h, q_id, k_id: q_id - k_id < window_tokens


def _attended_tokens(layer, lists, view, position_BT, model):
    """Mean keys per query; those of chunks and exact windows are known without counting."""
    kind = model.pattern[layer]
    if kind == "c":
        return (position_BT % model.chunk_tokens).mean(dtype=jnp.float32) + 1
    if kind == "s":
        window = model.window_tokens[layer]
        return jnp.minimum(position_BT + 1, window).mean(dtype=jnp.float32)
    return metrics.attended_tokens(lists, view.start_BT).mean()
