"""Settings, documents and keys that the tests of the index share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from bsa.index import build, local, route, turn
from bsa.index.settings import DIGESTS, GROUPED, LINKED, SIMILARITIES, IndexSettings

BASE = IndexSettings(
    C=4,
    span_blocks=1,
    span_min_blocks=1,
    span_similarity=0.3,
    query_block=8,
    J=24,
    sink_tokens=4,
    R=2,
    lloyd_steps=2,
    A=2,
    top_p=1.0,
    min_share=0.0,
    open_tokens=6,
    X=0,
    query_pool="mean",
    route_tokens=16,
    digest="clusters",
    store="float32",
    route="flat",
    chapter_bookmarks=3,
    chapter_by="position",
    volume_chapters=1,
    chapter_levels=1,
    chapter_R=2,
    beam=2,
    P=0,
    children=3,
    similarity="cosine",
    link_by="means",
    frontier=8,
    hops=1,
)
EVERYTHING = dataclasses.replace(
    BASE,
    C=2,
    span_blocks=3,
    spans="learned",
    A=3,
    top_p=0.61,
    query_pool="heads",
    store="bfloat16",
    route="graph",
    chapter_bookmarks=2,
    chapter_by="cluster",
    volume_chapters=2,
    chapter_levels=2,
    beam=1,
    P=2,
    hops=2,
)
SCALE = 0.5

_build_index = jax.jit(build.build_index, static_argnums=1)
search = jax.jit(functools.partial(route.search, scale=SCALE), static_argnames="index")


def boundary(index, k_BSGK):
    """Projections that turn as often as not, where spans are learned."""
    if index.spans != "learned":
        return None
    G, K = k_BSGK.shape[2:]
    random = np.random.default_rng(K)
    return turn.Boundary(
        *jnp.asarray(random.normal(size=(2, G, K, K)).astype(np.float32))
    )


def build_index(k_BSGK, index, start_BS=None):
    return _build_index(k_BSGK, index, start_BS, boundary(index, k_BSGK))


@st.composite
def indices(draw, routes=("flat", "chapters", "graph")):
    """Settings of every digest, likeness, link and route together."""
    digest, C = draw(st.sampled_from(DIGESTS)), draw(st.sampled_from([2, 4]))
    two = digest in ("minmax", "meanvar")
    grouped = draw(st.sampled_from(["position", *GROUPED]))
    shortest, longest = draw(st.sampled_from([(1, 1), (1, 1), (1, 3), (2, 4), (2, 2)]))
    kinds = ["learned", "alike"] if shortest < longest else ["alike"]
    stores = ["float32", "float32", "bfloat16", *(["int8"] if longest == 1 else [])]
    has_squares = digest in ("meanvar", "spread")
    chapter_stores = ["float32", *([] if has_squares else ["float8"])]
    index = dataclasses.replace(
        BASE,
        digest=digest,
        store=draw(st.sampled_from(stores)),
        chapter_store=draw(st.sampled_from(chapter_stores)),
        C=C,
        A=draw(st.integers(2, 3)),
        span_blocks=longest,
        span_min_blocks=shortest,
        spans=draw(st.sampled_from(kinds)),
        sink_tokens=C * draw(st.integers(0, 1)),
        R=2 if two else draw(st.integers(1, C)),
        chapter_R=2 if two else draw(st.integers(1, 2)),
        query_pool=draw(st.sampled_from(["mean", "heads"])),
        point_pool=draw(st.sampled_from(["logsumexp", "max"])),
        X=draw(st.sampled_from([0, 4])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.61])),
        min_share=draw(st.sampled_from([0.0, 0.0, 0.17])),
        route=draw(st.sampled_from(routes)),
        chapter_bookmarks=draw(st.integers(2, 3)),
        chapter_by=grouped,
        volume_chapters=1 if grouped == "position" else draw(st.integers(2, 3)),
        chapter_levels=draw(st.integers(1, 3)),
        beam=draw(st.integers(1, 3)),
        similarity=draw(st.sampled_from(SIMILARITIES)),
        link_by=draw(st.sampled_from(LINKED)),
        P=draw(st.integers(1, 3)),
        children=draw(st.integers(1, 3)),
        frontier=draw(st.integers(4, 6)),
        hops=draw(st.integers(0, 2)),
    )
    return index


def positions(key, batch, tokens, documents):
    """Positions of rows cut into random documents."""
    cuts = jax.random.randint(key, (batch, documents), 0, tokens)
    begins = (
        jnp.zeros((batch, tokens), bool).at[jnp.arange(batch)[:, None], cuts].set(True)
    )
    place = jnp.arange(tokens)
    start = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    return (place - start).astype(jnp.int32)


def window_blocks(index):
    """Blocks of a window that is as short as it may be, or of two."""
    return max(2, index.span_blocks)


def window_view(position_BT, window_tokens, index):
    return local.window(
        position_BT,
        window_tokens=window_tokens,
        sink_tokens=index.sink_tokens,
        key_block=index.C,
    )


def queries_and_keys(seed, shape, index, kinds):
    """q_BTHK and k_BSGK; the keys of every coarsest chapter are one of `kinds`, so that equal ones tie to the last bit.

    Args:
        shape: (B, T, H, G, K).
        kinds: different chapters a row; 0: all differ.
    """
    B, T, H, G, K = shape
    random = np.random.default_rng(seed)
    q_BTHK = random.normal(size=(B, T, H, K)).astype(np.float32)
    k_BSGK = random.normal(size=(B, T, G, K)).astype(np.float32)
    if kinds:
        levels = 0 if index.route == "flat" else index.chapter_levels
        span = index.C * index.chapter_bookmarks**levels
        kind = random.integers(0, min(kinds, -(-T // span)), -(-T // span))
        token = (kind[:, None] * span + np.arange(span)).reshape(-1)[:T]
        k_BSGK = k_BSGK[:, np.minimum(token, T - 1)]
    return jnp.asarray(q_BTHK), jnp.asarray(k_BSGK)


def check_digest(point_RK, log_count_R, expected_RK, count_R):
    """Compares points that stand for tokens, in any order: rounding decides which of two keys is nearer their mean."""

    def in_order(point_RK, count_R):
        rows = np.column_stack([point_RK, count_R])[count_R > 0]
        return rows[np.lexsort((rows[:, -1], np.round(rows[:, 0], 4)))]

    ours = in_order(point_RK, np.exp(log_count_R))
    theirs = in_order(expected_RK, np.asarray(count_R))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def check_spans(spans, lengths, index, g):
    """Every known span is as long as expected."""
    if index.span_blocks == 1:
        assert spans is None and set(lengths) == {1}
        return
    for found, expected in zip(spans.length_BGM[0, g].tolist(), lengths):
        assert expected is None or found == expected


def check_quotes(quote_R, point_RK, k_CK):
    """Each quote is the key nearest to its point; rounding may decide which of two that are equally near."""
    gap_RC = np.square(np.asarray(point_RK)[:, None] - np.asarray(k_CK)).sum(-1)
    for quote, gap_C in zip(np.asarray(quote_R), gap_RC):
        assert quote < 0 or gap_C[quote] <= gap_C.min() + 1e-5
