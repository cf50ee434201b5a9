"""Which blocks each query block reads, over shards of a row: the index is built shard by shard, routing is global.

Bookmarks are small, so every device gathers those of the whole row (chapters that do not straddle a shard, and the
parents of each bookmark, too) and routes its own tokens through them. For the exact step it gathers the row's keys as well:
16 in bfloat16 are as many bytes as eight float32 points. Called by `bsa.model.attention`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import (
    build,
    chapter,
    learn,
    link,
    local,
    metrics,
    pooled,
    precision,
    route,
    settings,
    span,
    turn,
    unite,
)
from bsa.parallel import mesh
from pallas_kernels import selection, shapes


def read_locally(
    view: local.LocalView,
    index: settings.IndexSettings,
    num_groups: int,
    placement: mesh.Placement,
):
    """The lists of layers that choose nothing, and refused_BGQ: see `unite.unite`."""
    num_blocks = view.low_BT.shape[1] // view.key_block + 1

    def unite_shard(view):
        return unite.unite(
            None, view, index, num_groups // _heads(placement), num_blocks=num_blocks
        )

    view_axes = _axes_of_view(view)
    return placement.run_on_shards(
        unite_shard, inputs=(view_axes,), outputs=(_axes_of_lists(index), "BGQ")
    )(view)


def choose(
    q_BTHK,
    k_BSGK,
    view: local.LocalView,
    index: settings.IndexSettings,
    placement: mesh.Placement,
    *,
    scale: float,
    implementation: str = "xla",
    noise=None,
    boundary: turn.Boundary | None = None,
):
    """Builds the index, routes each token, and unites what it chose with what it reads anyway.

    Args:
        implementation, noise, boundary: as in `route.search_blocks`; and what finds learned spans.
    Returns:
        count_BGM (tokens that chose each bookmark), scored_BGT, a `turn.Learned` or None; the lists; `unite`'s refused_BGQ.
    Raises:
        ValueError: shards are not whole blocks, heads do not divide, or query blocks choose.
    """
    S = shapes.check(q_BTHK=q_BTHK, k_BSGK=k_BSGK, low_BT=view.low_BT)["S"]
    devices = placement.context

    def choose_shard(q_BTHK, k_BSGK, view, seed_BGT, boundary):
        if devices == 1:
            bookmarks = build.build_index(k_BSGK, index, view.start_BT, boundary)
        else:
            bookmarks = build_shard(k_BSGK, view.start_BT, index, devices, boundary)
        B, T, G, K = k_BSGK.shape
        keys = k_BSGK.reshape(B, T // index.C, index.C, G, K).transpose(0, 3, 1, 2, 4)
        if devices > 1 and index.X:
            keys = _gather(lax.stop_gradient(keys))
        choice_BGTA, scored_BGT = route.search_blocks(
            q_BTHK,
            keys,
            bookmarks,
            route.open_blocks(view, index),
            index,
            scale=scale,
            is_row=devices == 1,
            implementation=implementation,
            noise=None if noise is None else (seed_BGT, noise[1]),
        )
        lists, refused_BGQ = unite.unite(
            choice_BGTA,
            view,
            index,
            G,
            num_blocks=S // index.C + 1,
            before_BGUA=_last_of_the_one_before(choice_BGTA, index, devices),
        )
        count_BGM = metrics.count_choices(choice_BGTA, S // index.C)
        if devices > 1:
            count_BGM = lax.psum(count_BGM, "context")
        learned = span.learned(bookmarks.spans, index)
        return (count_BGM, scored_BGT, learned), lists, refused_BGQ

    pooled.refuse(index)
    _check_blocks(S, index, devices)
    more = None if noise is None else noise[0], boundary
    axes_of_more = jax.tree.map(lambda x: "BGT" if x is more[0] else "GKK", more)
    axes_of_learned = turn.Learned("BGM", "BGM") if boundary else None
    return placement.run_on_shards(
        choose_shard,
        inputs=("BTHK", "BSGK", _axes_of_view(view), *axes_of_more),
        outputs=(("BGM", "BGT", axes_of_learned), _axes_of_lists(index), "BGQ"),
    )(q_BTHK, k_BSGK, view, *more)


def bias(
    attending,
    sought,
    lists: selection.BlockSelection,
    view: local.LocalView,
    index: settings.IndexSettings,
    placement: mesh.Placement,
    *,
    scale: float,
    weight: float,
    mass_weight: float,
):
    """`learn.list_bias` of whole arrays.

    Args:
        attending, sought: q_BTHK and k_BSGK of the attention, and of the index.
    Raises:
        ValueError: a row lies on several devices.
    """
    if placement.context > 1:
        raise ValueError(
            f"scores as a bias over context={placement.context} devices are not supported; set model.score_weight=0 and "
            "model.mass_weight=0"
        )

    def bias_shard(attending, sought, lists, view):
        return learn.list_bias(
            *(*sought, lists, view.open_blocks, index),
            scale=scale,
            weight=weight,
            attending=attending,
            mass_weight=mass_weight,
        )

    pair = "BTHK", "BSGK"
    return placement.run_on_shards(
        bias_shard,
        inputs=(pair, pair, _axes_of_lists(index), _axes_of_view(view)),
        outputs="BGTJ",
    )(attending, sought, lists, view)


def build_shard(
    k_BSGK,
    start_BS,
    index: settings.IndexSettings,
    devices: int,
    boundary: turn.Boundary | None = None,
) -> build.BookmarkIndex:
    """`build.build_index` of a row of which this device holds a part; the index is whole on every device.

    Args:
        start_BS: int32, place in the whole row where each token's document begins.
        devices: along "context".
        boundary: what finds learned spans.
    """
    sizes = shapes.check(k_BSGK=k_BSGK, start_BS=start_BS)
    B, S, G, K = (sizes[letter] for letter in "BSGK")
    num = S // index.C
    k_BSGK = lax.stop_gradient(k_BSGK)
    k_BGNCK = k_BSGK.reshape(B, num, index.C, G, K).transpose(0, 3, 1, 2, 4)
    own_M = lax.axis_index("context") * num + jnp.arange(num, dtype=jnp.int32)
    start_BM = start_BS[:, index.C - 1 :: index.C]
    parts, spans = build.mark(k_BGNCK, own_M, index), None
    if index.span_blocks > 1:
        parts, spans = _spans(parts, own_M, start_BM, boundary, index, devices)
    point, log_count, quote = parts
    point, scale = precision.pack(point, index.store)
    kept = precision.unpack(point, log_count, scale)
    chapters = _chapters(*kept, own_M[0], index, devices)
    point, log_count, quote, scale = _gather((point, log_count, quote, scale))
    bookmarks = build.BookmarkIndex(
        point, log_count, quote, chapters, None, spans, scale
    )
    if not index.P:
        return bookmarks
    low_BM = build.first_bookmark(start_BM, index.C)
    parents = link.find_parents(
        bookmarks.nodes, bookmarks.member_BGM, own_M, low_BM, index
    )
    parents = _gather(parents)
    total = num * devices
    id_M = jnp.arange(total, dtype=jnp.int32)
    id_M = jnp.where(id_M < span.num_known(total, index), id_M, total)
    links = link.enter(link.empty(B, G, total, index), *parents, id_M)
    return dataclasses.replace(bookmarks, links=links)


def _spans(parts, own_M, start_BM, boundary, index, devices):
    """The parts of this device's blocks as `span.settle` makes them, and the `Spans` of all."""
    num, more = own_M.shape[0], index.span_blocks - 1
    total = num * devices
    whole_start_BM = lax.all_gather(start_BM, "context", axis=1, tiled=True)

    # A device's own blocks, the one before them, and as many after as it takes to know how long the last one's span is.
    id_N = own_M[0] - 1 + jnp.arange(1 + num + more, dtype=jnp.int32)
    within_N = jnp.clip(id_N, 0, total - 1)
    near = jax.tree.map(lambda x: x[:, :, within_N], _gather(parts))
    start_BN = whole_start_BM[:, within_N]
    turn_BGN = turn.find(near[:2], id_N, start_BN, boundary, index)
    id_N, start_BN = id_N[1:], start_BN[:, 1:]
    near, turn_BGN = jax.tree.map(lambda x: x[:, :, 1:], (near, turn_BGN))
    own_length = span.lengths(near[:2], id_N, start_BN, turn_BGN, index)[:, :, :num]
    length_BGM = span.begin(
        _gather(own_length), jnp.zeros(own_length.shape[:2], jnp.int32), index
    )
    rest_BG = span.rest(length_BGM, own_M[0], index)
    near, _ = span.settle(near, id_N, start_BN, turn_BGN, rest_BG, total, index)
    own, turn_BGM = jax.tree.map(lambda x: x[:, :, :num], (near, turn_BGN))
    return own, span.Spans(length_BGM, whole_start_BM, _gather(turn_BGM))


def _chapters(point_BGMRK, log_count_BGMR, first_id, index, devices):
    """All levels, whole: those that divide evenly among the devices are made by each for its own part."""
    num = point_BGMRK.shape[2]
    wanted = chapter.num_levels(num * devices, index)
    shared, members = 0, num
    while shared < wanted and members % _group(shared, index) == 0:
        members //= index.chapter_bookmarks
        shared += 1
    levels = _gather(
        chapter.group(point_BGMRK, log_count_BGMR, index, range(shared), first_id)
    )
    if shared:
        last = levels[-1].point_BGERK, levels[-1].log_count_BGER
    else:
        last = _gather((point_BGMRK, log_count_BGMR))
    return levels + chapter.group(*last, index, range(shared, wanted))


def _group(level, index):
    """Members of a level that a device must have all of to make chapters."""
    return index.chapter_bookmarks * chapter.together(level, index)


def _last_of_the_one_before(choice_BGTA, index, devices):
    """Choices of the tokens just before this device's; None on a single one, and none before the first."""
    num = index.open_tokens - 1
    if devices == 1 or not num:
        return None
    if num > choice_BGTA.shape[2]:
        raise ValueError(
            f"open_tokens={index.open_tokens}: choices stay open past a whole shard of {choice_BGTA.shape[2]} tokens"
        )
    pairs = [(i, i + 1) for i in range(devices - 1)]
    sent = lax.ppermute(choice_BGTA[:, :, -num:], "context", pairs)
    return jnp.where(lax.axis_index("context") == 0, -1, sent)


def _gather(tree):
    """Arrays with axes BGM.. of all devices, in order."""
    return jax.tree.map(
        lambda x: lax.all_gather(x, "context", axis=2, tiled=True), tree
    )


def _check_blocks(S, index, devices):
    """Raises ValueError unless every device gets whole blocks."""
    for name in ("C", "query_block"):
        if S % (devices * getattr(index, name)):
            raise ValueError(
                f"T={S} tokens over context={devices} devices are no whole blocks of "
                f"index.{name}={getattr(index, name)}; make T a multiple of {devices * getattr(index, name)}"
            )


def _heads(placement):
    """Devices that split the heads."""
    return 1 if placement.mesh is None else placement.mesh.shape["tensor"]


def _axes_of_view(view):
    return jax.tree.map(lambda _: "BT", view)


def _axes_of_lists(index):
    return selection.BlockSelection("BGQJ", "BGQ", "BGQJ", index.query_block, index.C)
