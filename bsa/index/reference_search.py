"""Chapters, links and searches in plain Python loops: the oracle of `chapter`, `link`, `tree` and `graph`.

Called by `reference` and by tests. `best(level, ids, num)` stands for any way to judge: the ids of the `num` highest
scores, best first, lower ids before higher ones of the same score.
"""

import numpy as np

from bsa.index import reference_digest, settings


def group(bookmarks, index: settings.IndexSettings):
    """Digests of each level: the bookmarks themselves, then complete chapters; see `chapter.group`."""
    levels, size = [bookmarks], index.chapter_bookmarks
    for _ in range(index.chapter_levels if index.route != "flat" else 0):
        below = levels[-1]
        if len(below) < size:
            break
        levels.append(
            [
                reference_digest.aggregate(
                    below[e * size : (e + 1) * size], index.chapter_R, index
                )
                for e in range(len(below) // size)
            ]
        )
    return levels


def find(best, num_levels: int, low: int, high: int, index, num: int):
    """Bookmarks of [low, high) that a coarse to fine search finds, best first, and how many nodes it scored.

    A node is scored if all its bookmarks lie in the range and its chapter was chosen, or has none that does.
    """
    size, scored, chosen = index.chapter_bookmarks, 0, None

    def is_inside(level, node):
        span = size**level
        return low <= node * span and (node + 1) * span <= high

    for level in reversed(range(num_levels)):
        nodes = [n for n in range(high) if is_inside(level, n)]
        if chosen is not None:
            nodes = [
                n
                for n in nodes
                if n // size in chosen or not is_inside(level + 1, n // size)
            ]
        scored += len(nodes)
        chosen = best(level, nodes, index.beam if level else num)
    return chosen, scored


def walk(best, links, frontier, low: int, high: int, index):
    """The frontier after its hops along links, and how many bookmarks were scored on the way; see `graph.walk`."""
    scored = 0
    for _ in range(index.hops):
        near = {n for m in frontier for n in links["parent"][m] + links["child"][m]}
        seen = sorted(set(frontier) | {n for n in near if low <= n < high})
        scored += len(seen) - len(frontier)
        frontier = best(0, seen, index.frontier)
    return frontier, scored


def similarity(places, other_places, kind: str) -> float:
    """Of the most similar pair of points; see `link.similarity`."""
    return max(
        _direction(a, kind) @ _direction(b, kind) for a in places for b in other_places
    )


def link(levels, low_M, known: int, index: settings.IndexSettings):
    """Parents, their weights, children, roots and depths of all bookmarks, as lists; see `link.Links`.

    Args:
        low_M: first bookmark that each may have as a parent.
        known: bookmarks; what comes after them is none yet.
    """

    def voices(level, node):
        digest = levels[level][node]
        if level == 0 and index.link_by == "means":
            return [reference_digest.centre(index.digest, *digest)]
        return reference_digest.places(index.digest, *digest)[0]

    M = len(levels[0])
    links = {"parent": [], "weight": [], "root": [], "depth": []}
    links["child"] = [[] for _ in range(M)]
    for m in range(M):

        def alike(level, node, m=m):
            return similarity(voices(0, m), voices(level, node), index.similarity)

        def best(level, nodes, num):
            nodes = [n for n in nodes if levels[level][n][1].any()]
            ranked = sorted(nodes, key=lambda n: (-alike(level, n), n))
            return ranked[:num]

        parents = []
        if m < known and levels[0][m][1].any():
            parents, _ = find(best, len(levels), int(low_M[m]), m, index, index.P)
        links["parent"].append(parents)
        links["weight"].append([alike(0, p) for p in parents])
        for p in parents:
            if len(links["child"][p]) < index.children:
                links["child"][p].append(m)
        links["root"].append(links["root"][parents[0]] if parents else m)
        links["depth"].append(links["depth"][parents[0]] + 1 if parents else 0)
    return links


def _direction(place_K, kind):
    if kind == "pearson":
        place_K = place_K - place_K.mean()
    return place_K if kind == "dot" else place_K / max(np.linalg.norm(place_K), 1e-20)
