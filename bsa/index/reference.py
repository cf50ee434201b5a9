"""The index in plain NumPy loops, readable by eye: what every variant is tested against. Nothing else calls it."""

import numpy as np

from bsa.index import settings


def cluster(k_CK, num_points: int, lloyd_steps: int):
    """Points and counts of one block; see `digest.cluster`."""
    k_CK = np.asarray(k_CK, np.float64)

    def distances(point_K):
        return np.square(k_CK - point_K).sum(-1)

    points = [k_CK[np.argmin(distances(k_CK.mean(0)))]]
    while len(points) < num_points:
        points.append(k_CK[np.argmax(np.min([distances(p) for p in points], axis=0))])

    def members():
        nearest_C = np.argmin([distances(p) for p in points], axis=0)
        return [k_CK[nearest_C == r] for r in range(num_points)]

    for _ in range(lloyd_steps):
        points = [m.mean(0) if len(m) else p for m, p in zip(members(), points)]
    return np.stack(points), np.array([len(m) for m in members()])


def local_blocks(
    token: int, start: int, window_tokens: int, index: settings.IndexSettings
) -> set[int]:
    """Blocks that a token always reads: window and sinks of its document, which starts at `start`."""
    own, first = token // index.C, start // index.C
    window = range(max(first, own - window_tokens // index.C + 1), own + 1)
    return set(window) | {
        n for n in range(first, first + index.sink_tokens // index.C) if n <= own
    }


def open_blocks(
    token: int, start: int, window_tokens: int, index: settings.IndexSettings
) -> list[int]:
    """Blocks that a token may choose: whole ones of its document, closed, past the sinks and before the window."""
    low = max(-(-start // index.C), (start + index.sink_tokens) // index.C)
    window = max(start // index.C, token // index.C - window_tokens // index.C + 1)
    return list(range(low, window))


def choose(
    token: int,
    start: int,
    q_THK,
    k_SK,
    window_tokens: int,
    index: settings.IndexSettings,
    scale: float,
) -> list[int]:
    """The blocks that one token chooses, best first; see `route.choose_blocks`.

    Args:
        q_THK: queries of one group's H/G heads.
        k_SK: keys of that group.
    """
    q_HK = np.asarray(q_THK, np.float64)[token] * scale
    if index.query_pool == "mean":
        q_HK = q_HK.mean(0, keepdims=True)
    k_SK = np.asarray(k_SK, np.float64)

    def by_points(block):
        point_RK, count_R = cluster(
            k_SK[block * index.C : (block + 1) * index.C], index.R, index.lloyd_steps
        )
        return np.log((count_R * np.exp(q_HK @ point_RK.T)).sum(-1))

    def by_keys(block):
        return np.log(
            np.exp(q_HK @ k_SK[block * index.C : (block + 1) * index.C].T).sum(-1)
        )

    def best(blocks, score, num):
        if not blocks:
            return []
        score_NH = np.stack([score(n) for n in blocks])
        if index.query_pool == "heads":
            score_NH = np.exp(score_NH) / np.exp(score_NH).sum(0)
        order = np.argsort(-score_NH.sum(1), kind="stable")[:num]
        return [blocks[i] for i in order]

    candidates = open_blocks(token, start, window_tokens, index)
    if not index.X:
        return best(candidates, by_points, index.A)
    return best(best(candidates, by_points, index.X), by_keys, index.A)


def unite(choice_TA, start_T, window_tokens: int, index: settings.IndexSettings):
    """Lists of one head's query blocks; see `unite.unite`.

    Each is a dict, in the order of the list, from block id to the set of tokens that read it.

    Args:
        choice_TA: a list of chosen block ids for each token.
        start_T: where each token's document begins.
    """
    lists = []
    for begin in range(0, len(start_T), index.query_block):
        tokens = range(begin, begin + index.query_block)
        local_T = {t: local_blocks(t, start_T[t], window_tokens, index) for t in tokens}
        listed = set().union(*local_T.values())
        room, shut = index.J - len(listed), False
        readers = {n: {t for t in tokens if n in local_T[t]} for n in sorted(listed)}
        for opener in range(
            max(0, begin - index.open_tokens + 1), begin + index.query_block
        ):
            wanted = set(choice_TA[opener]) - set(readers)
            shut = shut or len(wanted) > room
            if not shut:
                room -= len(wanted)
                readers |= {n: set() for n in sorted(wanted)}
            for n in set(choice_TA[opener]) & set(readers):
                readers[n] |= {
                    t
                    for t in tokens
                    if opener <= t < opener + index.open_tokens
                    and n >= start_T[t] // index.C
                }
        lists.append(readers)
    return lists
