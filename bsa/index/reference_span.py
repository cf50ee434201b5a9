"""Spans in plain NumPy loops: the oracle of `span`. Called by `reference` and by tests."""

import numpy as np

from bsa.index import reference_digest, reference_search, settings


def turns(blocks, start_M, boundary, index: settings.IndexSettings):
    """How much each block turns away from the one before it; see `turn.find`.

    Args:
        boundary: two matrices.
    """
    means = [
        reference_digest.centre(index.digest, *block[:2]).astype(np.float64)
        for block in blocks
    ]
    found = []
    for block, mean_K in enumerate(means):
        before_K, after_K = boundary[0] @ means[block - 1], boundary[1] @ mean_K
        lengths = np.linalg.norm(before_K) * np.linalg.norm(after_K)
        turn = (1 - before_K @ after_K / lengths) / 2
        found.append(1.0 if _is_cut(start_M, block, index) else turn)
    return found


def join(blocks, start_M, turn_M, index: settings.IndexSettings):
    """Walks from span to span; see `span.settle`.

    Args:
        blocks: (point_RK, count_R, quotes) of each, quotes as tokens of the row.
        start_M: where the document of each block's last token begins.
        turn_M: of `turns`; None: spans are not learned.
    Returns:
        The digests of the spans at their first blocks, of no token inside of spans, the blocks' own where it is not
        known yet; and the length of the span at each block, None where it is not known.
    """
    known = max(len(blocks) - index.span_blocks + 1, 0)
    joined, lengths = list(blocks), [None] * len(blocks)
    begin = 0
    while begin < known:
        num = 1
        while num < index.span_blocks and _goes_on(
            blocks, start_M, turn_M, begin, num, index
        ):
            num += 1
        for block in range(begin + 1, min(begin + num, known)):
            point_RK, count_R, quotes = blocks[block]
            joined[block] = (0 * point_RK, 0 * count_R, [-1] * len(quotes))
            lengths[block] = 0
        if num > 1:
            joined[begin] = _join(blocks[begin : begin + num], index)
        lengths[begin] = num
        begin += num
    return joined, lengths


def expand(begins, lengths, high: int, num: int):
    """The blocks of chosen spans below `high`, at most `num`; see `span.expand`."""
    found = [n for m in begins for n in range(m, min(m + lengths[m], high))]
    return found[:num]


def _is_cut(start_M, block, index):
    """Whether the document begins anew here."""
    first = int(start_M[block]) // index.C + index.sink_tokens // index.C
    return block <= max(first, -(-int(start_M[block]) // index.C))


def _goes_on(blocks, start_M, turn_M, begin, num, index):
    """Whether the span of `num` blocks takes in the next one."""
    block = begin + num
    if _is_cut(start_M, block, index):
        return False
    if turn_M is not None:
        return num < index.span_min_blocks or turn_M[block] < 0.5
    means = [
        reference_digest.centre(index.digest, *blocks[n][:2])
        for n in range(begin, block + 1)
    ]
    alike = reference_search.similarity(
        [np.mean(means[:-1], axis=0)], means[-1:], index.similarity
    )
    return num < index.span_min_blocks or alike >= index.span_similarity


def _join(members, index):
    """The digest of a span's blocks."""
    point_RK, count_R = reference_digest.aggregate(
        [member[:2] for member in members], index.R, index
    )
    quoted = [
        (point_K, quote)
        for points, _, quotes in members
        for point_K, quote in zip(points, quotes)
        if quote >= 0
    ]
    quotes = []
    for r, point_K in enumerate(point_RK):
        is_place = count_R[r] and not (index.digest == "meanvar" and r == 1)
        gaps = np.array([np.square(place_K - point_K).sum() for place_K, _ in quoted])
        first = np.flatnonzero(gaps <= 1.001 * gaps.min())[0]
        quotes.append(quoted[first][1] if is_place else -1)
    return point_RK, count_R, quotes
