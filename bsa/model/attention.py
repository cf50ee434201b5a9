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

from bsa.index import learn, local, metrics, turn, unite
from bsa.model import dense, settings, temperature
from bsa.parallel import attend as attend_lib
from bsa.parallel import mesh, select
from pallas_kernels import selection

FOLLOWED = "followed"
"""What a bookmark layer hands on to those that follow it, `Followed`."""

SAVED = "selection"
"""Name under which lists are kept for backward, so that rematerialised layers do not route twice."""


class Heads(NamedTuple):
    """What a layer compares and sums.

    Attributes:
        sought: queries and keys by which the index is built and searched: attention's own, or others with a query for
            each key/value head. Their logits are scaled as attention's are.
        gates: three gate_BTH in [0, 1], of the means of blocks, the chosen blocks and the local view, each read by a
            softmax of its own; None: one softmax over what is chosen and the local view.
        noise: on scores, as `route.search_blocks` wants it; None: there is none.
        filter_CGK: how those keys are mixed first, see `learn.mix`; None: not at all.
        boundary: what finds learned spans; None: spans are not learned.
        again_HKK: what heads found (second K), times this, joins their queries (last K) and they search and read once
            more; None: they don't.
        sharpness_BT: float32, what queries were multiplied with, for what joins them; None: nothing.
    """

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    sought: tuple[jax.Array, jax.Array]
    gates: tuple[jax.Array, jax.Array, jax.Array] | None = None
    noise: tuple[jax.Array, float] | None = None
    filter_CGK: jax.Array | None = None
    boundary: turn.Boundary | None = None
    again_HKK: jax.Array | None = None
    sharpness_BT: jax.Array | None = None

    def ask_again(self, found_BTHK):
        """Those that search and read the second time."""
        more_BTHK = jnp.einsum("BTHL,HLK->BTHK", found_BTHK, self.again_HKK)
        q_BTHK = self.q_BTHK + temperature.sharpen(more_BTHK, self.sharpness_BT)
        return self._replace(
            q_BTHK=q_BTHK, sought=(q_BTHK, self.sought[1]), again_HKK=None
        )


class Followed(NamedTuple):
    """What layers of kind f have of the bookmark layer before them.

    Attributes:
        lists: they read what it selected.
        sought: queries and keys of its index, which their attention teaches too; None in decoding.
        spans: of its index, taught as well; None in decoding, and if they are not learned.
    """

    lists: selection.BlockSelection
    sought: tuple[jax.Array, jax.Array] | None
    spans: turn.Learned | None


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
        out_BTHK, and a dict of figures: `attended_tokens` (mean over tokens, of both times for heads that ask again), for
        bookmark layers also `scored_nodes` (bookmarks and chapters, [B, T]), `union_tokens`, `refused_choices`,
        `selection_entropy`, `unread_bookmarks`, the lists as `selection`, and `followed`; if spans are learned `span_ratio`,
        a loss, and `span_blocks`, their mean length; if rows are taught, for them and those that follow
        `selection_divergence`.
    Raises:
        ValueError: selection is to be learned, or branches are to be joined, in rows that lie on several devices.
    """
    where = segment_id_BT, position_BT, model, layer, followed, placement
    if heads.again_HKK is None:
        return _attend_once(heads, *where)
    found_BTHK, first = _attend_once(heads, *where)
    out_BTHK, figures = _attend_once(heads.ask_again(found_BTHK), *where)
    attended = first["attended_tokens"] + figures["attended_tokens"]
    return out_BTHK, figures | {"attended_tokens": attended}


def _attend_once(heads, segment_id_BT, position_BT, model, layer, followed, placement):
    """`attend` by these queries."""
    if heads.filter_CGK is not None:
        heads = _mix(heads, model)
    kind, scale = model.pattern[layer], heads.q_BTHK.shape[-1] ** -0.5
    if kind == "d":
        arrays = *heads[:3], segment_id_BT
        if placement.context == 1:
            out = dense.attend(*arrays, scale)
        else:
            out = attend_lib.dense(*arrays, placement, scale=scale)
        return out, {"attended_tokens": position_BT.mean(dtype=jnp.float32) + 1}

    rules = {"scale": scale, "implementation": model.implementation}
    view, segment_id_BT, mask_mod = _view(position_BT, segment_id_BT, model, layer)
    spans = None
    if kind == "b":
        (*counts, spans), lists, refused_BGQ = select.choose(
            *(*heads.sought, view, model.index, placement),
            noise=heads.noise,
            boundary=heads.boundary,
            **rules,
        )
    elif kind == "f":
        lists, spans = followed.lists, followed.spans
        heads = heads._replace(sought=followed.sought)
    else:
        lists, _ = select.read_locally(view, model.index, model.G, placement)
    lists = lists if kind == "f" else checkpoint_name(lists, SAVED)
    bias_BGTJ, learned = _learn(heads, lists, spans, view, model, layer, placement)

    def read(lists, bias_BGTJ=None):
        return attend_lib.block_sparse_attention(
            *(*heads[:3], lists, segment_id_BT, placement),
            bias_BGTJ=bias_BGTJ,
            mask_mod=mask_mod,
            **rules,
        )

    if heads.gates is None:
        out_BTHK = read(lists, bias_BGTJ)
    else:
        nearby, _ = select.read_locally(view, model.index, model.G, placement)
        means_BTHK = _read_means(heads, segment_id_BT, view, placement)
        chosen_BTHK = read(unite.without(lists, nearby), bias_BGTJ)
        out_BTHK = _join(heads.gates, means_BTHK, chosen_BTHK, read(nearby))
    attended = _attended_tokens(layer, lists, view, position_BT, model)
    figures = {"attended_tokens": attended} | learned
    if kind == "b":
        figures |= _of_choices(*counts, lists, refused_BGQ, view)
        figures |= {SAVED: lists, FOLLOWED: Followed(lists, heads.sought, spans)}
    return out_BTHK, figures


def _of_choices(count_BGM, scored_BGT, lists, refused_BGQ, view):
    """Figures of what a bookmark layer looked at, chose and had no room for."""
    entropy, unread = metrics.bookmark_use(count_BGM, view)
    return {
        "scored_nodes": scored_BGT.mean(1, dtype=jnp.float32),
        "union_tokens": lists.count_BGQ.mean(dtype=jnp.float32) * lists.key_block,
        "refused_choices": refused_BGQ.mean(dtype=jnp.float32),
        "selection_entropy": entropy,
        "unread_bookmarks": unread,
    }


def _join(gates, *branches):
    """Each head's sum of branches, as far as its gates let them through."""
    return sum(gate_BTH[..., None] * out for gate_BTH, out in zip(gates, branches))


def _view(position_BT, segment_id_BT, model, layer):
    """What tokens read anyway, the segments that they read in, and the mask of layers that cut inside a block, or None."""
    kind, window_tokens = model.pattern[layer], model.window_tokens[layer]
    if kind == "c":
        view = local.chunk(position_BT, model.chunk_tokens, model.index.C)
        return view, local.chunk_segments(position_BT, model.chunk_tokens), None
    if kind == "s":
        view, mask_mod = _sliding(position_BT, window_tokens, model.index)
        return view, segment_id_BT, mask_mod
    view = local.window(
        position_BT,
        window_tokens=window_tokens,
        sink_tokens=sink_tokens(model, layer),
        key_block=model.index.C,
    )
    return view, segment_id_BT, None


def sink_tokens(model: settings.ModelSettings, letter: int) -> int:
    """First tokens of the document that a layer always reads: of kinds w, b and f."""
    reads = model.pattern[letter] in ("wbf" if model.window_sinks else "bf")
    return model.index.sink_tokens if reads else 0


def _read_means(heads, segment_id_BT, view, placement):
    """Attention to the means of all blocks that are complete: the compressed branch of NSA, without weights of its own."""
    if placement.context > 1:
        raise ValueError(
            f"model.branch_gates over context={placement.context} devices is not supported; set mesh.context=1"
        )
    q_BTHK, k_BSGK, v_BSGK = heads[:3]

    def means(x_BSGK):
        B, _, G, K = x_BSGK.shape
        return x_BSGK.reshape(B, -1, view.key_block, G, K).mean(2)

    out_BTHK = dense.attend(
        *(q_BTHK, means(k_BSGK), means(v_BSGK), segment_id_BT),
        q_BTHK.shape[-1] ** -0.5,
        key_tokens=view.key_block,
    )
    has_any_BT = metrics.complete_blocks(view) > 0
    return jnp.where(has_any_BT[..., None, None], out_BTHK, 0)


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


def _learn(heads, lists, spans, view, model, layer, placement):
    """By what selection is learned: the bias of chosen blocks, how far scores are from where attention would fall, and spans."""
    bias_BGTJ, figures, scale = None, {}, heads.q_BTHK.shape[-1] ** -0.5
    if model.pattern[layer] not in "bf":
        return bias_BGTJ, figures
    if spans is not None and model.pattern[layer] == "b":
        found = turn.ratio(spans, model.span_mean_blocks)
        figures |= dict(zip(("span_ratio", "span_blocks"), found))
    if model.is_biased and model.pattern[layer] == "b":
        attending = heads.q_BTHK, heads.k_BSGK
        bias_BGTJ = select.bias(
            *(attending, heads.sought, lists, view, model.index, placement),
            scale=scale,
            weight=model.score_weight,
            mass_weight=model.mass_weight,
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
            spans=spans,
        )
    return bias_BGTJ, figures


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
    """Mean keys per query, means among them; those of chunks and exact windows are known without counting."""
    kind = model.pattern[layer]
    if kind == "c":
        return (position_BT % model.chunk_tokens).mean(dtype=jnp.float32) + 1
    if kind == "s":
        window = model.window_tokens[layer]
        return jnp.minimum(position_BT + 1, window).mean(dtype=jnp.float32)
    attended = metrics.attended_tokens(lists, view.start_BT).mean()
    if kind == "b" and model.branch_gates:
        attended += metrics.complete_blocks(view).mean(dtype=jnp.float32)
    return attended
