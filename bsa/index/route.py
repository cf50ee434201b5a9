"""Queries through the index to the blocks that each token chooses. Called by `bsa.model.attention`.

`flat`: every token scores every bookmark that is closed and outside its window; work is tokens x bookmarks. `chapters`:
coarse to fine (`tree`), a beam at each level. `graph`: the same to enter, then hops along links (`graph`). With a
shortlist, exact keys decide after any of them; `top_p` and `min_share` then leave fewer than A. Patterns (`pattern`) look
at no query. Memory is one piece of `route_tokens` tokens at a time.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import (
    build,
    chapter,
    digest,
    graph,
    judge,
    kernel,
    local,
    pattern,
    settings,
    span,
    tree,
)
from pallas_kernels import shapes

PARTS = 8
"""Parts of a row, each of which scores bookmarks up to its own end: 7/16 of the work on the coarsest nodes is left out."""

PART_PIECES = 8
"""Fewest pieces of a part: each is compiled for itself."""


def choose_blocks(
    q_BTHK,
    k_BSGK,
    bookmarks: build.BookmarkIndex,
    view: local.LocalView,
    index: settings.IndexSettings,
    *,
    scale: float,
):
    """Picks the A blocks that each token most wants to read beyond its local view.

    A block scores the logarithm of the attention mass that its digest promises (`digest.score`). Spans of unequal length
    are ranked by density, the same mass for each of their tokens, and the best are read block by block as far as the A
    reach. With a shortlist (X > 0) the X best blocks are scored again by their exact keys. Causal: block n is open to
    token t only from C tokens after the block's end, when it has left the window; a span is when its first block has.
    Gradients stop here.

    Args:
        q_BTHK: queries of all S tokens, or of some of them.
        k_BSGK: keys that the index was built from; read only by the exact step.
        view: of these tokens.
        scale: of the attention's logits.
    Returns:
        choice_BGTA: int32 block ids, best first, -1 where fewer are open to the token, were found or are worth reading.
    """
    return search(q_BTHK, k_BSGK, bookmarks, view, index, scale=scale)[0]


def search(
    q_BTHK,
    k_BSGK,
    bookmarks: build.BookmarkIndex,
    view: local.LocalView,
    index: settings.IndexSettings,
    *,
    scale: float,
):
    """`choose_blocks`, and scored_BGT: int32, bookmarks and chapters that each token compared its query with."""
    sizes = shapes.check(
        q_BTHK=q_BTHK, k_BSGK=k_BSGK, log_count_BGMR=bookmarks.log_count_BGMR
    )
    B, G, K, M = (sizes[letter] for letter in "BGKM")
    k_BGMCK = k_BSGK.reshape(B, M, index.C, G, K).transpose(0, 3, 1, 2, 4)
    return search_blocks(
        q_BTHK,
        k_BGMCK,
        bookmarks,
        open_blocks(view, index),
        index,
        scale=scale,
        is_row=sizes["T"] == sizes["S"],
    )


def open_blocks(view: local.LocalView, index: settings.IndexSettings):
    """`LocalView.open_blocks`: where the bookmarks are that each token may choose.

    Raises:
        ValueError: blocks would leave the window before it is known which span they belong to.
    """
    if view.num_blocks < index.span_blocks:
        raise ValueError(
            f"a window of {view.num_blocks} blocks is shorter than index.span_blocks={index.span_blocks}, the longest span; "
            "make it longer"
        )
    return view.open_blocks


@jax.named_scope("route")
def search_blocks(
    q_BTHK,
    keys,
    bookmarks: build.BookmarkIndex,
    open_blocks,
    index: settings.IndexSettings,
    *,
    scale: float,
    read=operator.getitem,
    is_row: bool = False,
    implementation: str = "xla",
    noise=None,
):
    """`search` for tokens anywhere in a text whose keys lie in blocks.

    Args:
        keys: k_BGMCK, or a tree of arrays that begin with these three axes.
        open_blocks: low_BT and high_BT of the function of that name.
        read: (keys of one row and head, id_X) -> k_XCK, floating.
        is_row: the tokens are all of the row, whose later bookmarks are then not even scored for its earlier tokens.
        implementation: as in `dispatch`; the kernel (`kernel.can_search`) rounds: nearly equal blocks may change places.
        noise: seed_BGT, uint32, and how many times Gumbel noise of these seeds joins the scores of a flat search: once, and
            bookmarks are drawn without replacement, by the mass that they promise. None: no noise.
    """
    sizes = shapes.check(q_BTHK=q_BTHK, log_count_BGMR=bookmarks.log_count_BGMR)
    B, T, H, G, K = (sizes[letter] for letter in "BTHGK")
    if index.route in settings.PATTERNS:
        return pattern.choose(open_blocks, G, index), jnp.zeros((B, G, T), jnp.int32)
    q_BTHK, keys, bookmarks = lax.stop_gradient((q_BTHK, keys, bookmarks))
    if index.route == "flat":
        # A text that was read through chapters may be asked about without them.
        bookmarks = dataclasses.replace(bookmarks, chapters=())
    if noise is None and kernel.can_search(q_BTHK, bookmarks, index, implementation):
        q_BTGHK = q_BTHK.reshape(B, T, G, H // G, K).astype(jnp.float32) * scale
        q_BTGK = digest.widen(index.digest, q_BTGHK).mean(3)
        choice, scored = kernel.search(q_BTGK, bookmarks, open_blocks, index)
        if index.X:
            q = jnp.moveaxis(q_BTGK, 1, 2)[:, :, :, None]
            choice = judge.best_by_keys(q, keys, choice, index, read)
        return choice, scored
    piece = min(index.route_tokens, T)
    pad = -T % piece

    def pieces(x, axis):
        x = jnp.pad(
            x, [(0, pad if i == axis else 0) for i in range(x.ndim)], mode="edge"
        )
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], -1, piece, *x.shape[axis + 1 :]), axis, 0
        )

    # [G, H/G] heads: those of a group share a list.
    q = pieces(q_BTHK.reshape(B, T, G, H // G, K), 1)
    low_BT, high_BT = open_blocks
    seed_BGT, noise_scale = noise or (None, 0.0)
    seeds = jax.tree.map(lambda x: pieces(x, 2), seed_BGT)

    def choose(bookmarks, arguments):
        q, low, high, seed_BGT = arguments
        q = jnp.moveaxis(q, 1, 2).astype(jnp.float32) * scale
        q = digest.widen(index.digest, q)
        noise = seed_BGT, noise_scale
        return _choose(q, keys, bookmarks, (low, high), noise, index, read)

    rows = q, pieces(low_BT, 1), pieces(high_BT, 1), seeds
    num = max(-(-q.shape[0] // PARTS), PART_PIECES) if is_row else q.shape[0]
    found = []
    for begin in range(0, q.shape[0], num):
        seen = bookmarks
        if is_row:
            seen = _before(bookmarks, (begin + num) * piece, index)
        part = jax.tree.map(lambda x, i=begin: x[i : i + num], rows)
        found.append(lax.map(functools.partial(choose, seen), part))
    choice, scored = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    choice = jnp.moveaxis(choice, 0, 2).reshape(B, G, T + pad, -1)[:, :, :T]
    scored = jnp.moveaxis(scored, 0, 2).reshape(B, G, T + pad)[:, :, :T]
    return choice.astype(jnp.int32), scored


def _choose(q, keys, bookmarks, open_blocks, noise, index, read):
    """Choices and counts of a piece of the tokens: scaled float32 queries [B, G, T, H/G, K], widened."""
    low, high = open_blocks
    if index.query_pool == "mean":
        q = q.mean(3, keepdims=True)
    if index.route == "flat":
        choice, scored = _find_flat(q, bookmarks, low, high, index, noise)
    else:
        choice, scored = _find_along(q, bookmarks, low, high, index)
    if not index.X and judge.has_budget(index):
        choice = judge.best_by_points(q, bookmarks.judged[0], choice, index)
    if bookmarks.spans is not None:
        length_BGM = bookmarks.spans.length_BGM
        choice = span.expand(choice, length_BGM, high, index.X or index.A)
    if index.X:
        choice = judge.best_by_keys(q, keys, choice, index, read)
    missing = index.A - choice.shape[-1]
    padding = [(0, 0)] * 3 + [(0, missing)]
    return jnp.pad(choice, padding, constant_values=-1), scored


def _before(bookmarks, num_tokens, index):
    """The index without those of its coarsest nodes that no token before `num_tokens` can see."""
    *finer, coarsest = bookmarks.judged
    size = -(-num_tokens // (index.C * index.chapter_bookmarks ** len(finer)))
    (point, log_count, *scale), turn = jax.tree.map(lambda x: x[:, :, :size], coarsest)
    if not finer:
        spans = bookmarks.spans
        return dataclasses.replace(
            bookmarks,
            point_BGMRK=point,
            log_count_BGMR=log_count,
            spans=spans and dataclasses.replace(spans, turn_BGM=turn),
            scale_BGMR=scale[0],
        )
    *finer, last = bookmarks.chapters
    last = chapter.Chapters(point, log_count, last.member_BGM)
    return dataclasses.replace(bookmarks, chapters=(*finer, last))


def _find_flat(q, bookmarks, low, high, index, noise):
    """The best of all open bookmarks for q [B, G, T, H/G, K]: ids [B, G, T, X or A], and how many were scored."""
    place = jnp.arange(bookmarks.point_BGMRK.shape[2], dtype=jnp.int32)
    seed_BGT, noise_scale = noise

    def draw(seed):
        return jax.random.gumbel(jax.random.key(seed), place.shape)

    def of_group(q_THK, judged, seed_T, low_T, high_T):
        T, H, K = q_THK.shape
        score = judge.score(q_THK.reshape(T * H, K), judged, index)
        is_open = (place >= low_T[:, None]) & (place < high_T[:, None])
        score = judge.pool_heads(score.reshape(T, H, -1), is_open, index.query_pool)
        if seed_T is not None:
            score += noise_scale * jax.vmap(draw)(seed_T)
        return tree.best(score, place, index.X or index.A), is_open.sum(
            -1, dtype=jnp.int32
        )

    of_row = jax.vmap(of_group, in_axes=(0, 0, 0, None, None))
    return jax.vmap(of_row)(q, bookmarks.judged[0], seed_BGT, low, high)


def _find_along(q, bookmarks, low, high, index):
    """As `_find_flat`, through chapters and, for the graph, along links; a token at a time, batched."""
    num = index.X or index.A
    is_graph = index.route == "graph"
    links = bookmarks.links if is_graph else None
    width = (index.beam + 2) * index.chapter_bookmarks
    if is_graph:
        width = max(width, index.frontier * (1 + index.P + index.children))
    gathered = bookmarks.nodes[:-1] or bookmarks.nodes
    batch = judge.count_batch(4 * width * max(x[:, :, 0].size for x, *_ in gathered))

    def of_group(q_THK, nodes, member_M, links, low_T, high_T):
        def of_token(arguments):
            q_HK, low, high = arguments

            def rate(level, id_X, is_open_X):
                node = nodes[level]
                if id_X is not None:
                    node = jax.tree.map(lambda x: x[id_X], node)
                score_HX = judge.score(q_HK, node, index, level)
                return judge.pool_heads(score_HX, is_open_X, index.query_pool)

            id_X, scored = tree.search(
                rate,
                [node[0][0].shape[0] for node in nodes],
                low,
                high,
                member_M,
                group=index.chapter_bookmarks,
                volume=index.volume_chapters,
                beam=index.beam,
                num=index.frontier if is_graph else num,
            )
            if is_graph:
                id_X, more = graph.walk(
                    rate,
                    links.parent_BGMP,
                    links.child_BGMP,
                    id_X,
                    low,
                    high,
                    frontier=index.frontier,
                    hops=index.hops,
                )
                scored += more
            return id_X[:num], scored

        return lax.map(of_token, (q_THK, low_T, high_T), batch_size=batch)

    of_row = jax.vmap(of_group, in_axes=(0, 0, 0, 0, None, None))
    return jax.vmap(of_row)(q, bookmarks.judged, bookmarks.member_BGM, links, low, high)
