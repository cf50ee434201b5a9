"""Suites of needles, as data: what is hidden in texts of RULER's kind, asked for far beyond the trained length."""

from experiments import quality_methods, quality_parts

_knobs, _layers = quality_methods.knobs, quality_methods.layers


def _parts(tasks, lengths, samples=0):
    return [
        quality_parts.Part(task, n, samples=samples) for n in lengths for task in tasks
    ]


# Texts of RULER's kind: 3.3M parameters, trained on up to 4K tokens, 524M in a cell. Who begins with them keeps guessing
# digits: so recall comes first, then texts that ask for all of their needles, and both stay in the mix. Two pairs of layers as in
# recall, of which the last alone sees everything: with one pair, with two layers of windows before one, or where the first pair
# sees everything too, and without positions, keys of two tokens are learned slowly or not at all (LOG.md). All that select begin
# as dense attention, for 4K tokens are cheap to read whole: selectors get the same heads, learned as fast as dense.
_READING_BASE = {
    **_knobs("model", D=256, H=4, G=4, K=64, F=704, V=512, L=4, remat="none"),
    **_knobs("model", chunk_tokens=512),
    **_knobs("index", A=4, J=96, R=4, store="bfloat16"),
    **_knobs("data", B=16, T=4096, passkey_share=0.0),
    **_knobs("train", steps=8000, learning_rate=2e-3, warmup_steps=50),
    **quality_methods.started("scsd", 6000),
}
_ANEW = quality_methods.started("", 0)


def _reading(kind, tokens=64, positions="rrrn"):
    """A layer that reads 2 or 4 tokens before each of chunks and of a kind."""
    return _layers(f"scs{kind}", (2, 64, 4, tokens), positions)


_EXACT = _reading("b") | _knobs("index", store="float32")
"""For those whose scores have gradients."""

# How many blocks stay open depends on how alike neighbours choose; 256 tokens of window are a guess at a bookmark layer's
# budget, to be set by the attended tokens that the first cell reports.
_READING_METHODS = {
    "dense": _layers("sdsd", (2, 64, 4, 64), "rrrr") | _ANEW,
    "irope": _reading("d") | _ANEW,
    "window": _reading("w", 256, "rrrr") | _knobs("index", sink_tokens=0) | _ANEW,
    "streaming": _reading("w", 256, "rrrr") | _ANEW,
    **quality_methods.selectors(_reading("b"), A=4),
    "points_8": _reading("b") | _knobs("index", R=8),
    "moba": _reading("b", 16, "rrrr")
    | quality_methods.MEAN_KEY
    | _knobs("index", A=15, J=256, open_tokens=1, sink_tokens=0),
    **{
        name: _reading("b") | knobs
        for name, knobs in quality_methods.patterns(A=10, stride=10).items()
    },
    "anew": _reading("b") | _ANEW,
    **quality_methods.learned(_EXACT),
    **quality_methods.grouped(_EXACT),
}


def _all_asked(lengths_and_keys, **options):
    return [
        quality_parts.Part(
            "niah_multikey_1", n, {"num_keys": m, "num_questions": m, **options}
        )
        for n, m in lengths_and_keys
    ]


_LESSONS = [
    quality_parts.Part("mqar", n, {"num_pairs": m, "V": 512})
    for n, m in ((64, 4), (128, 8), (128, 16), (128, 32))
]
_EXERCISES = [
    *_LESSONS[1::2],
    *_all_asked(((64, 2), (128, 4), (512, 16))),
    *_all_asked(((64, 2), (256, 8)), value="name"),
]
# Keys of two tokens are told apart sooner where most rows ask for all of their needles.
_SCHOOL = ((0.05, _LESSONS), (0.15, _EXERCISES))
_NEEDLES = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "variable_tracking"),
)
_COUNTS = ("common_words", "frequent_words")
NEEDLES = quality_parts.Suite(
    base=_READING_BASE,
    methods=_READING_METHODS,
    lessons=_SCHOOL,
    train=[
        *_EXERCISES,
        *_parts(_NEEDLES, (256, 1024, 4096)),
        *_parts(_COUNTS, (2048, 4096)),
    ],
    tests=_parts((*_NEEDLES, *_COUNTS), (4096,), samples=32)
    + _parts(_NEEDLES, (16384,), samples=32)
    + _parts(_NEEDLES, (65536,), samples=40)
    + _parts(["niah_single_1"], (2**18, 2**20), samples=8),
)


# Context rot: one needle in words, and one among four, from the trained length to 256 times that.
_ROT_METHODS = {
    name: _READING_METHODS[name]
    for name in (
        *("dense", "window", "irope"),
        *("bookmark", "anew", "mean_key", "biased"),
    )
}
_ROT_TASKS = ("niah_single_2", "niah_multikey_1")
ROT = quality_parts.Suite(
    base=_READING_BASE | _knobs("train", steps=4000, start_steps=2500),
    methods=_ROT_METHODS,
    lessons=_SCHOOL,
    train=_EXERCISES + _parts(_ROT_TASKS, (256, 1024, 4096)),
    tests=_parts(_ROT_TASKS, (2**12, 2**14, 2**16), samples=64)
    + _parts(_ROT_TASKS, (2**18,), samples=16)
    + _parts(_ROT_TASKS, (2**20,), samples=8),
)


# Needles on two CPU cores, half an hour a cell, less where the start is shared: an eighth of the lengths, 10M tokens.
NEEDLES_SMALL = quality_parts.Suite(
    base=_READING_BASE
    | {
        **_knobs("model", D=128, K=32, F=256, dtype="float32"),
        **_knobs("index", C=8, query_block=16, J=32, store="float32"),
        **_knobs("index", open_tokens=8, sink_tokens=8),
        **_knobs("data", T=512),
        **_knobs("train", steps=1200, learning_rate=3e-3, start_steps=840),
    },
    methods={
        "window": _reading("w", 64, "rrrr") | _ANEW,
        "irope": _reading("d") | _ANEW,
        **{
            name: _READING_METHODS[name] | _layers("scsb", (2, 32, 4, 32), "rrrn")
            for name in ("bookmark", "mean_key", "minmax")
        },
    },
    lessons=((0.1, _LESSONS), (0.35, _EXERCISES)),
    train=_EXERCISES + _parts(_NEEDLES, (256, 512)),
    tests=_parts(_NEEDLES, (512, 2048, 8192), samples=32),
    seeds=(0,),
)
