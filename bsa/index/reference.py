"""The index in plain NumPy loops, readable by eye: what every variant is tested against. Nothing else calls it."""

import numpy as np

from bsa.index import reference_digest, reference_search, reference_span, settings


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


def build(k_SK, start_S, index: settings.IndexSettings, boundary=None):
    """The index of one head's keys: digests of each level, quotes and links; see `build.BookmarkIndex`.

    Args:
        start_S: where each token's document begins.
        boundary: two matrices, if spans are learned.
    """
    ends = range(index.C, len(k_SK) + 1, index.C)
    bookmarks = []
    for end in ends:
        begin = end - index.C
        point_RK, count_R, quotes = reference_digest.summarise(k_SK[begin:end], index)
        quotes = [q if q < 0 else begin + q for q in quotes]
        point_RK = reference_digest.keep(point_RK, index.store)
        bookmarks.append((point_RK, count_R, quotes))
    start_M = [int(start_S[end - 1]) for end in ends]
    lengths, turn_M = [1] * len(bookmarks), None
    if index.spans == "learned":
        turn_M = reference_span.turns(bookmarks, start_M, boundary, index)
    if index.span_blocks > 1:
        bookmarks, lengths = reference_span.join(bookmarks, start_M, turn_M, index)
    digests = [
        (reference_digest.keep(point_RK, index.store), count_R)
        for point_RK, count_R, _ in bookmarks
    ]
    levels, members = reference_search.group(digests, index)
    made = {"levels": levels, "members": members, "lengths": lengths}
    made["turns"] = turn_M
    made["quotes"] = [bookmark[2] for bookmark in bookmarks]
    if index.P:
        low_M = [-(-start // index.C) for start in start_M]
        known = len(bookmarks) - index.span_blocks + 1
        made["links"] = reference_search.link(levels, members, low_M, known, index)
    return made


def choose(
    token: int,
    start: int,
    q_THK,
    k_SK,
    bookmarks,
    window_tokens: int,
    index: settings.IndexSettings,
    scale: float,
):
    """The blocks that one token chooses, best first, and how many nodes it scored; see `route.search`.

    Args:
        q_THK: queries of one group's H/G heads.
        k_SK: keys of that group.
        bookmarks: what `build` made of them.
    """
    asking = range(token, token + 1)
    if index.granularity == "block":
        begin = token // index.query_block * index.query_block
        asking = range(begin, min(begin + index.query_block, len(q_THK)))
    q_HK = np.asarray(q_THK, np.float64)[asking].mean(0) * scale
    wide_HK = np.stack([reference_digest.widen(index.digest, q_K) for q_K in q_HK])
    if index.query_pool == "mean":
        q_HK, wide_HK = (x.mean(0, keepdims=True) for x in (q_HK, wide_HK))
    k_SK = np.asarray(k_SK, np.float64)

    def by_digest(level, node):
        digest = bookmarks["levels"][level][node]
        compared_HK, point_RK = reference_digest.rounded(
            wide_HK, digest[0], index, level
        )
        digest = point_RK, digest[1]
        tokens = reference_digest.tokens(index.digest, digest[1])
        if index.span_blocks == 1:
            tokens = 1
        elif not tokens:
            return [-np.inf for _ in q_HK]
        scores = (
            reference_digest.score(index.digest, q_K, *digest, index.point_pool)
            for q_K in compared_HK
        )
        sure = 1
        if level == 0 and bookmarks["turns"]:
            sure = max(bookmarks["turns"][node], 0.05)
        return [score - np.log(tokens) + np.log(sure) for score in scores]

    def by_keys(_, block):
        return np.log(
            np.exp(q_HK @ k_SK[block * index.C : (block + 1) * index.C].T).sum(-1)
        )

    def by_points(level, nodes, num):
        return _rank([by_digest(level, n) for n in nodes], nodes, num, index)[0]

    def afford(score, nodes):
        return _afford([score(0, n) for n in nodes], nodes, index)

    candidates = open_blocks(asking[0], start, window_tokens, index)
    window_low = candidates[-1] + 1 if candidates else 0
    num = index.X or index.A
    if index.route == "flat" or not candidates:
        found, scored = by_points(0, candidates, num), len(candidates)
    else:
        low, high = candidates[0], candidates[-1] + 1
        entries = index.frontier if index.route == "graph" else num
        found, scored = reference_search.find(
            by_points, bookmarks["members"], low, high, index, entries
        )
        if index.route == "graph":
            found, more = reference_search.walk(
                by_points, bookmarks["links"], found, low, high, index
            )
            found, scored = found[:num], scored + more
    if not index.X and (index.top_p < 1 or index.min_share):
        found = afford(by_digest, found)
    found = reference_span.expand(found, bookmarks["lengths"], window_low, num)
    return (afford(by_keys, found) if index.X else found), scored


def _rank(scores, nodes, num, index):
    """The best nodes by their heads' scores, and the group's score of each; those of no token are left out."""
    real = [i for i, score_H in enumerate(scores) if np.isfinite(score_H).all()]
    if not real:
        return [], np.zeros(0)
    score_NH = np.stack([scores[i] for i in real])
    if index.query_pool == "heads":
        score_NH = np.exp(score_NH) / np.exp(score_NH).sum(0)
    score_N = score_NH.sum(1)
    order = np.argsort(-score_N, kind="stable")[:num]
    return [nodes[real[i]] for i in order], score_N[order]


def _afford(scores, nodes, index):
    """As many of the A best as `top_p` and `min_share` leave."""
    nodes, score_N = _rank(scores, nodes, index.A, index)
    weight_N = np.exp(score_N) if index.query_pool == "mean" else score_N
    share_N = weight_N / weight_N.sum()
    return [
        n
        for i, n in enumerate(nodes)
        if (index.top_p == 1 or share_N[:i].sum() < index.top_p)
        and share_N[i] >= index.min_share
    ]


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
