"""Bookmark to bookmark: the earlier ones it is most like, and back. Called by `build` and `grow`, walked by `graph`.

Parents are found by the search that routes queries (`tree`), with a bookmark in place of a query and likeness in place
of logits. Parents are always earlier, so links are known once their later end is closed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from bsa.index import digest, precision, settings, tree
from pallas_kernels import shapes

BATCH = 64
"""Bookmarks whose candidates are gathered at once; those of a flat search share one matrix product."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Links:
    """Chains of bookmarks. An id of -1 is none.

    Attributes:
        parent_BGMP: int32, the most similar earlier bookmarks of the document, best first, equal ones by id.
        weight_BGMP: float32, their similarity; 0 where there is no parent.
        child_BGMP: int32, bookmarks that have this one as a parent, the first in time; P is `children` here.
        num_children_BGM: int32, all of them, also those that found no room in the list.
        root_BGM: int32, where first parents lead; itself for a bookmark without parents.
        depth_BGM: int32, steps to the root.
    """

    parent_BGMP: jax.Array
    weight_BGMP: jax.Array
    child_BGMP: jax.Array
    num_children_BGM: jax.Array
    root_BGM: jax.Array
    depth_BGM: jax.Array


def empty(batch: int, groups: int, num_bookmarks: int, index: settings.IndexSettings):
    """`Links` of bookmarks that have none yet."""
    shape = (batch, groups, num_bookmarks)
    own = jnp.arange(num_bookmarks, dtype=jnp.int32)
    return Links(
        jnp.full((*shape, index.P), -1, jnp.int32),
        jnp.zeros((*shape, index.P), jnp.float32),
        jnp.full((*shape, index.children), -1, jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to(own, shape),
        jnp.zeros(shape, jnp.int32),
    )


def extend(
    links: Links, nodes, member_BGM, id_M, low_BM, index: settings.IndexSettings
) -> Links:
    """Links new bookmarks, which follow each other, to those before them.

    Args:
        links: of all bookmarks, or of a capacity of them; only the new ones and their parents change.
        nodes: see `build.BookmarkIndex`.
        member_BGM: see `chapter.Chapters`.
        id_M: int32, the new bookmarks, rising; ids past the capacity are ignored.
        low_BM: int32, the first bookmark that each may have as a parent.
    """
    return enter(links, *find_parents(nodes, member_BGM, id_M, low_BM, index), id_M)


def find_parents(nodes, member_BGM, id_M, low_BM, index: settings.IndexSettings):
    """parent_BGMP and weight_BGMP of new bookmarks; arguments as for `extend`, but ids need not follow each other."""

    def of_group(nodes, member_M, low_M):
        return _parents(nodes, member_M, id_M, low_M, index)

    of_row = jax.vmap(of_group, in_axes=(0, 0, None))
    return jax.vmap(of_row)(nodes, member_BGM, low_BM)


def enter(links: Links, parent_BGMP, weight_BGMP, id_M) -> Links:
    """Enters new bookmarks, whose parents are found, into the links; arguments as for `extend`."""

    def of_group(links, parent_MP, weight_MP):
        child_MP, num_children_M = _adopt(
            links.child_BGMP, links.num_children_BGM, parent_MP, id_M
        )
        root_M, depth_M = _chains(links.root_BGM, links.depth_BGM, parent_MP, id_M)
        return Links(
            links.parent_BGMP.at[id_M].set(parent_MP, mode="drop"),
            links.weight_BGMP.at[id_M].set(weight_MP, mode="drop"),
            child_MP,
            num_children_M,
            root_M,
            depth_M,
        )

    return jax.vmap(jax.vmap(of_group))(links, parent_BGMP, weight_BGMP)


def similarity(voice_MRK, other_MRK, kind: str):
    """How alike bookmarks are by their most similar points: float32[M, M of the others].

    Args:
        voice_MRK, other_MRK: float32, points; each has its own M and R. Those with NaN everywhere are not there.
        kind: see `digest.direction`.
    """
    shapes.check(voice_MRK=voice_MRK)
    voice_MRK, other_MRK = (digest.direction(x, kind) for x in (voice_MRK, other_MRK))
    pair = jnp.einsum("mrk,nsk->mnrs", voice_MRK, other_MRK)
    return jnp.where(jnp.isnan(pair), -jnp.inf, pair).max((2, 3))


def _voices(point_MRK, log_count_MR, index, merge):
    """Places of a digest, or with `merge` their mean; NaN for one that stands for no token."""
    if merge:
        return digest.centre(index.digest, point_MRK, log_count_MR)[:, None]
    place, count = digest.places(index.digest, point_MRK, log_count_MR)
    return jnp.where(count[..., None] > 0, place, jnp.nan)


def _parents(nodes, member_M, id_M, low_M, index):
    """The P bookmarks in [low, id) most similar to each, and how similar; -1 and 0 where there are fewer.

    An id past the capacity has none.
    """
    sizes = [node[0].shape[0] for node in nodes]
    merge = index.link_by == "means"

    def of_bookmark(arguments):
        own, low = arguments
        here = jnp.minimum(own, sizes[0] - 1)
        own_node = jax.tree.map(lambda x: x[here][None], nodes[0])
        voice_1RK = _voices(*precision.unpack(*own_node), index, merge)

        def rate(level, id_X, is_open_X):
            node = nodes[level]
            if id_X is not None:
                node = jax.tree.map(lambda x: x[id_X], node)
            other = _voices(*precision.unpack(*node), index, merge and not level)
            alike = similarity(voice_1RK, other, index.similarity)[0]
            return jnp.where(is_open_X, alike, -jnp.inf)

        parent_P, _ = tree.search(
            rate,
            sizes,
            low,
            jnp.where(own < sizes[0], own, 0),
            member_M,
            group=index.chapter_bookmarks,
            volume=index.volume_chapters,
            beam=index.beam,
            num=index.P,
        )
        parent_P = jnp.pad(
            parent_P, (0, index.P - parent_P.shape[0]), constant_values=-1
        )
        weight_P = rate(0, jnp.maximum(parent_P, 0), parent_P >= 0)
        return parent_P, jnp.where(parent_P < 0, 0, weight_P)

    return lax.map(of_bookmark, (id_M, low_M), batch_size=BATCH)


def _adopt(child_MP, num_children_M, parent_MP, id_M):
    """Enters new bookmarks into their parents' lists, in order of time, while there is room."""
    edge = parent_MP.reshape(-1)
    child = jnp.repeat(id_M, parent_MP.shape[1])
    edge = jnp.where(edge < 0, tree.NOWHERE, edge)
    edge, child = lax.sort((edge, child), num_keys=2)
    place = jnp.arange(edge.shape[0], dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones(1, bool), edge[1:] != edge[:-1]])
    rank = place - lax.cummax(jnp.where(is_first, place, 0))
    rank += num_children_M[jnp.minimum(edge, num_children_M.shape[0] - 1)]
    return (
        child_MP.at[edge, rank].set(child, mode="drop"),
        num_children_M.at[edge].add(1, mode="drop"),
    )


def _chains(root_M, depth_M, parent_MP, id_M):
    """Roots and depths along first parents, by pointer jumping: the way known doubles with each step."""
    has_parent = parent_MP[:, 0] >= 0
    root_M = root_M.at[id_M].set(
        jnp.where(has_parent, parent_MP[:, 0], id_M), mode="drop"
    )
    depth_M = depth_M.at[id_M].set(has_parent.astype(jnp.int32), mode="drop")
    for _ in range(id_M.shape[0].bit_length()):
        next_M = root_M.at[id_M].get(mode="clip")
        depth_M = depth_M.at[id_M].add(depth_M[next_M], mode="drop")
        root_M = root_M.at[id_M].set(root_M[next_M], mode="drop")
    return root_M, depth_M
