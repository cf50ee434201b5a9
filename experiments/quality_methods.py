"""Methods of `experiments.quality` as changes of knobs (`configs/base.py`).

Published methods are those that the index can express: `moba` and `quest` read their own block and the best others, by
mean key or by bound, for each head (so query heads have keys of their own, H = G); `mean_key` and `minmax` are bookmark
layers with their digests; `representatives` keeps the three keys of a block that are farthest from its mean, where InfLLM
asks which its neighbours attend to; `exact_shortlist` has the keys of the blocks that points found best pick among them;
`without_sinks` has windows that read no first tokens; `strided`, `fixed` and `random` are Sparse Transformer's and
BigBird's patterns beside window and sinks, with as many blocks as the budget has room for, not as many as the text asks
for; `streaming` is a window with sinks, without new positions in the cache; `irope` is Llama 4's schedule of layers
without the temperature that it has beyond the trained length; `nsa` has the three branches of NSA with gates, but means instead of a learned summary, one
size of blocks, and the same keys and values for all branches; `landmark` has Landmark's grouped softmax, with a block's
mean key for a landmark, and few blocks in training too; `halving` descends a binary tree as HiP does, see `halving`.
Ways of learning to select are methods too: `started` reads everything in its first tenth of steps (where needles are learned,
all that select do for longer, but for `anew`), `biased` adds scores to logits, `noisy` too, and draws blocks by their scores in training,
`grouped` lets scores alone share attention among blocks (and `grouped_taught` teaches them besides), `taught` compares
scores with dense attention, `indexer` teaches queries and keys that only the index uses.
"""


def knobs(section, **values):
    return {f"{section}.{name}": value for name, value in values.items()}


def layers(pattern, windows, positions=None):
    """Kinds of layers, with RoPE in all but the last unless said otherwise."""
    positions = positions or "r" * (len(pattern) - 1) + "n"
    return knobs("model", pattern=pattern, window_tokens=windows, positions=positions)


MEAN_KEY = knobs("index", digest="submeans", R=1)
MINMAX = knobs("index", digest="minmax", R=2)
"""Digests of MoBA (and of all that score block means) and of Quest, everything else as in a bookmark layer."""
REPRESENTATIVES = knobs("index", digest="distinctive", R=4)
"""Digest with the most telling keys of a block, beside the mean of the rest."""
NSA = MEAN_KEY | knobs("index", query_pool="heads") | knobs("model", branch_gates=True)
"""Branches of NSA: blocks chosen by the heads' softmaxes over means, which are read too, and gates (3 D H parameters)."""
GROUPED = knobs("model", score_weight=1.0, mass_weight=1.0)
"""A block's mass in the softmax is what its score promises; needs as many key/value heads as query heads."""
TAUGHT = knobs("model", taught_rows=64) | knobs("train", teach_weight=0.1)


def selectors(bookmark, A):
    """Bookmark layers, and the same with other digests, branches and searches."""
    return {
        "bookmark": bookmark,
        "mean_key": bookmark | MEAN_KEY,
        "minmax": bookmark | MINMAX,
        "representatives": bookmark | REPRESENTATIVES,
        "nsa": bookmark | NSA,
        "halving": bookmark | halving(A),
    }


def halving(A):
    """HiP's search: the best A of 2A chunks, each cut in half, until they are blocks.

    Published (arXiv 2406.09827), one token stands for a chunk, not its mean key; a block of queries searches together, not
    each token for itself; the first 2A chunks are of equal length whatever the text's, not of a power of two of blocks; and
    nothing is trained.
    """
    tree = knobs("index", route="chapters", chapter_bookmarks=2, chapter_levels=16)
    return MEAN_KEY | tree | knobs("index", chapter_R=1, beam=A)


def patterns(A, stride):
    """Bookmark layers whose A blocks depend on places alone; nobody's choice stays open."""
    return {
        name: knobs("index", route=name, A=A, stride=stride, open_tokens=1)
        for name in ("strided", "fixed", "random")
    }


def grouped(bookmark):
    """Bookmark layers whose scores share attention among blocks; H = G."""
    return {
        "landmark": bookmark | MEAN_KEY | GROUPED,
        "grouped": bookmark | GROUPED,
        "grouped_taught": bookmark | GROUPED | TAUGHT,
    }


def started(pattern, steps):
    """First steps in which layers read by another pattern."""
    return knobs("train", start_steps=steps, start_pattern=pattern)


def learned(bookmark):
    """Bookmark layers that learn to select in other ways."""
    return {
        "biased": bookmark | knobs("model", score_weight=1.0),
        "noisy": bookmark | knobs("model", score_weight=1.0, score_noise=1.0),
        "taught": bookmark | TAUGHT,
        "indexer": bookmark | TAUGHT | knobs("model", route_width=32),
    }
