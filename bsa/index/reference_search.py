"""Chapters, links and searches in plain Python loops: the oracle of `chapter`, `link`, `tree` and `graph`.

Called by `reference` and by tests. `best(level, ids, num)` stands for any way to judge: the ids of the `num` highest
scores, best first, lower ids before higher ones of the same score.
"""

import numpy as np

from bsa.index import reference_digest, settings


def group(bookmarks, index: settings.IndexSettings):
    """Digests of each level, bookmarks and then complete chapters, and for each level above them the members of each.

    See `chapter.group`.
    """
    levels, members, size = [bookmarks], [], index.chapter_bookmarks
    for level in range(index.chapter_levels if index.route != "flat" else 0):
        below = levels[-1]
        volume = size * (index.volume_chapters if level == 0 else 1)
        order = [
            begin + place
            for begin in range(0, len(below) - volume + 1, volume)
            for place in _order(below[begin : begin + volume], level, index)
        ]
        if not order:
            break
        members.append([order[e : e + size] for e in range(0, len(order), size)])
        levels.append(
            [
                reference_digest.aggregate(
                    [below[n] for n in chapter], index.chapter_R, index
                )
                for chapter in members[-1]
            ]
        )
    return levels, members


def find(best, members, low: int, high: int, index, num: int):
    """Bookmarks of [low, high) that a coarse to fine search finds, best first, and how many nodes it scored.

    A chapter takes part if all that share its members do. A node is scored if it takes part, and its chapter was chosen
    or takes no part.

    Args:
        members: of each chapter of each level, as `group` returns them.
    """
    taking_part = [list(range(low, high))]
    for level, chapters in enumerate(members):
        shared = index.volume_chapters if level == 0 else 1
        inside = [set(chapter) <= set(taking_part[-1]) for chapter in chapters]
        taking_part.append(
            [
                e
                for e in range(len(chapters))
                if all(inside[e // shared * shared : e // shared * shared + shared])
            ]
        )
    scored, chosen = 0, None
    for level in reversed(range(len(taking_part))):
        nodes = taking_part[level]
        if chosen is not None:
            hidden = set(taking_part[level + 1]) - set(chosen)
            hidden = {n for e in hidden for n in members[level][e]}
            nodes = [n for n in nodes if n not in hidden]
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


def link(levels, members, low_M, known: int, index: settings.IndexSettings):
    """Parents, their weights, children, roots and depths of all bookmarks, as lists; see `link.Links`.

    Args:
        levels, members: of `group`.
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
            parents, _ = find(best, members, int(low_M[m]), m, index, index.P)
        links["parent"].append(parents)
        links["weight"].append([alike(0, p) for p in parents])
        for p in parents:
            if len(links["child"][p]) < index.children:
                links["child"][p].append(m)
        links["root"].append(links["root"][parents[0]] if parents else m)
        links["depth"].append(links["depth"][parents[0]] + 1 if parents else 0)
    return links


def _order(volume, level, index: settings.IndexSettings):
    """Places of a volume's bookmarks, chapter by chapter; see `chapter.join`."""
    if level or index.chapter_by == "position":
        return range(len(volume))
    real = [place for place, digest in enumerate(volume) if digest[1].any()]
    centres = {n: reference_digest.centre(index.digest, *volume[n]) for n in real}
    if index.chapter_by == "cluster":
        if not real:
            return range(len(volume))
        centre_CK = np.stack([centres[n] for n in real])
        count_C = np.ones(len(real))
        points, _ = reference_digest.cluster(
            centre_CK, index.volume_chapters, index.lloyd_steps, count_C
        )
        labels = dict(
            zip(real, np.square(centre_CK[:, None] - points).sum(-1).argmin(1))
        )
        return sorted(range(len(volume)), key=lambda n: labels.get(n, len(volume)))
    walked, left = [0], list(range(1, len(volume)))
    while left:
        here = centres.get(walked[-1])
        alike = {
            n: similarity([here], [centres[n]], index.similarity)
            for n in left
            if here is not None and n in centres
        }
        walked.append(max(left, key=lambda n: alike.get(n, -np.inf)))
        left.remove(walked[-1])
    return walked


def _direction(place_K, kind):
    if kind == "pearson":
        place_K = place_K - place_K.mean()
    return place_K if kind == "dot" else place_K / max(np.linalg.norm(place_K), 1e-20)
