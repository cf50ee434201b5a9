"""Suites that change one knob at a time, as data; and the recall that most of them are learned by.

Recall (Zoology's MQAR) learns in a few hundred steps and misses when the index misses, so it tells settings of an index
apart in a cell of a minute. How many layers should be global is asked of text.
"""

from experiments import quality_methods, quality_parts

_knobs, _layers = quality_methods.knobs, quality_methods.layers

RECALL_BASE = {
    **_knobs("model", D=128, H=2, G=2, K=64, F=256, V=8192, L=2, remat="none"),
    **_knobs("index", C=8, query_block=16, J=80, A=4, R=4, open_tokens=1),
    **_knobs("index", sink_tokens=0),
    **_knobs("data", B=256, T=256, passkey_share=0.0),
    **_knobs("train", steps=2000, learning_rate=3e-3, warmup_steps=50),
}
RECALL_TRAIN = [
    quality_parts.Part("mqar", length, {"num_pairs": pairs})
    for length, pairs in ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
]


def _recall(lengths, **knobs):
    """Tests with as many pairs as a length has room for."""
    return [
        quality_parts.Part("mqar", n, {"num_pairs": n // 4}, 1024, knobs)
        for n in lengths
    ]


def _blocks(C, A):
    return _knobs("index", C=C, A=A)


def _spans(shortest, longest):
    """A bookmark for so many blocks."""
    return _knobs("index", span_min_blocks=shortest, span_blocks=longest)


# 64 tokens of window and 64 chosen in the second layer, so that spans of eight blocks are possible; a search among chapters
# reads two of sixteen at 1,024 tokens. 66M tokens a cell.
_GRAPH = _knobs("index", route="graph", P=4, beam=2, hops=1)
KNOBS = quality_parts.Suite(
    base=RECALL_BASE
    | _layers("sb", (2, 64))
    | _knobs("index", A=8, J=144)
    | _knobs("train", steps=1000),
    methods={
        "default": {},
        "blocks_of_4": _blocks(4, 16),
        "blocks_of_16": _blocks(16, 4),
        "blocks_of_32": _blocks(32, 2),
        **{f"marks_of_{n}": _spans(n, n) for n in (2, 4, 8)},
        "marks_adaptive": _spans(1, 8),
        "marks_learned": _spans(1, 8)
        | _knobs("index", spans="learned")
        | _knobs("model", span_mean_blocks=4.0),
        **{f"points_{n}": _knobs("index", R=n) for n in (1, 2, 8)},
        "best_points": _knobs("index", point_pool="max"),
        "exact_shortlist": _knobs("index", X=16),
        "rope_keys": _knobs("model", positions="rr"),
        "keys_before_rope": _knobs("model", positions="rr", route_before_rope=True),
        **{
            f"links_{name}": _GRAPH | _knobs("index", similarity=name)
            for name in ("cosine", "dot", "pearson")
        },
        "links_learned": _GRAPH
        | _knobs("model", route_width=32)
        | quality_methods.TAUGHT,
        "links_of_parents": _GRAPH | _knobs("index", children=0),
        **{f"hops_{hops}": _GRAPH | _knobs("index", hops=hops) for hops in (0, 2, 3)},
    },
    train=RECALL_TRAIN,
    tests=_recall((256, 512, 1024)),
    seeds=(0,),
)


# Trained without scaling on up to 256 tokens, tested with each on up to eight times that; without positions beside it.
def _stretched(kind, **more):
    scaling = _knobs("model.rope_scaling", kind=kind, trained_tokens=256, **more)
    return _recall((512, 2048), **scaling)


SCALING = quality_parts.Suite(
    base=RECALL_BASE | _knobs("train", steps=1000),
    methods={
        "dense": _layers("sd", (2, 16), "rr"),
        "bookmark": _layers("sb", (2, 16), "rr"),
        "dense_nope": _layers("sd", (2, 16)),
        "bookmark_nope": _layers("sb", (2, 16)),
    },
    train=RECALL_TRAIN,
    tests=[
        *_recall((256, 512, 2048)),
        *_stretched("linear", factor=8.0),
        *_stretched("ntk", factor=8.0),
        *_stretched("dynamic", factor=8.0, tokens=2048),
        *_stretched("yarn", factor=8.0),
        *_stretched("llama3", factor=8.0, fast_turns=4.0),
    ],
)


# Text by 16 layers, of which every 2nd to every 16th reads bookmarks; the score is bits per byte. 66M bytes a cell.
def _every(num):
    bookmark = _layers("w" * (num - 1) + "b", (256,) * num)
    return bookmark | _knobs("train", start_pattern="w" * num)


LAYERS = quality_parts.Suite(
    base={
        **_knobs("model", D=256, H=4, G=2, K=64, F=704, L=16, remat="none"),
        **_knobs("index", A=4, J=64),
        **_knobs("data", B=16, T=4096),
        **_knobs("train", steps=1000, learning_rate=2e-3, warmup_steps=100),
        **_knobs("train", start_steps=150),
    },
    methods={f"every_{num}_layers": _every(num) for num in (2, 4, 8, 16)},
    train=[quality_parts.Part("text", 4096)],
    tests=[
        quality_parts.Part("text", 4096, samples=32),
        quality_parts.Part("text", 16384, samples=8),
    ],
    seeds=(0,),
)
