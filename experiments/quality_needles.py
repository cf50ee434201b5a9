"""Suites of needles, as data: what is hidden in texts of RULER's kind, asked for far beyond the trained length."""

import dataclasses

from experiments import quality_methods, quality_parts

_knobs, _layers = quality_methods.knobs, quality_methods.layers


def _parts(tasks, lengths, samples=0):
    return [
        quality_parts.Part(task, n, samples=samples) for n in lengths for task in tasks
    ]


# Texts of RULER's kind: 4.1M parameters, trained on up to 4K tokens, 524M in a cell. Who begins with them keeps guessing
# digits: so recall comes first, then short texts that ask for several of their needles, and both stay in the mix. The last layer
# alone sees everything: where an earlier one does too, and without positions, keys of two tokens are not learned. Of the two layers
# of windows one can count what was answered, the next fetch the key that is asked for then; chunks of 512 in their place learn
# it later (LOG.md). All that select begin as `rnope`, for 4K tokens are cheap to read whole: selectors get the same
# heads, learned as fast as dense. Lists have room for whatever is chosen: far beyond the trained length neighbours choose less
# alike, and what finds no room is what the last tokens chose, those that answer. Windows read no sinks: by their distance
# layers with RoPE learn the order of needles, which is wrong beyond the trained length.
_READING_BASE = {
    **_knobs("model", D=256, H=4, G=4, K=64, F=704, V=512, L=5, remat="none"),
    **_knobs("model", chunk_tokens=512, window_sinks=False),
    **_knobs("index", A=4, J=136, R=4, store="bfloat16"),
    **_knobs("data", B=16, T=4096, passkey_share=0.0),
    **_knobs("train", steps=8000, learning_rate=2e-3, warmup_steps=50),
    **quality_methods.started("swwsd", 6000),
}
_ANEW = quality_methods.started("", 0)


def _reading(kind, tokens=64, positions="rrrrn", window=128):
    """Two tokens, windows twice, four tokens, and a layer of a kind."""
    return _layers(f"swws{kind}", (2, window, window, 4, tokens), positions)


_EXACT = _reading("b") | _knobs("index", store="float32")
"""For those whose scores have gradients."""

# How many blocks stay open depends on how alike neighbours choose: at 65,536 tokens 210 a token and layer, over all tasks and two
# seeds of exact_shortlist. A last window of 800 gives layers of windows as many.
_LAST_WINDOW = 800
_READING_METHODS = {
    "dense": _layers("sddsd", (2, 64, 64, 4, 64), "rrrrr") | _ANEW,
    "rnope": _reading("d"),
    "irope": _layers("sccsd", (2, 64, 64, 4, 64), "rrrrn") | _ANEW,
    "window": _reading("w", _LAST_WINDOW, "rrrrr")
    | _knobs("index", sink_tokens=0)
    | _ANEW,
    "streaming": _reading("w", _LAST_WINDOW, "rrrrr")
    | _knobs("model", window_sinks=True)
    | _ANEW,
    **quality_methods.selectors(_reading("b"), A=4),
    "minmax_6": _reading("b") | quality_methods.MINMAX | _knobs("index", A=6, J=192),
    "points_8": _reading("b") | _knobs("index", R=8),
    "exact_shortlist": _reading("b") | _knobs("index", R=8, X=32),
    "moba": _reading("b", 16, "rrrrr")
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


def _all_asked(lengths_and_keys, task="niah_multikey_1", **options):
    return [
        quality_parts.Part(task, n, {"num_keys": m, "num_questions": m, **options})
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
    quality_parts.Part("niah_multiquery", 64, {"num_keys": 2, "num_asked": 2}),
    quality_parts.Part("niah_multiquery", 128, {"num_keys": 4, "num_asked": 3}),
    quality_parts.Part("niah_multivalue", 64, {"num_values": 2}),
    quality_parts.Part("variable_tracking", 64, {"hops": 1}),
    quality_parts.Part("variable_tracking", 128, {"hops": 3}),
]
# Keys of two tokens are told apart sooner where most rows ask for all of their needles.
_SCHOOL = ((0.05, _LESSONS), (0.15, _EXERCISES))
_NEEDLES = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "variable_tracking"),
)
NEEDLES = quality_parts.Suite(
    base=_READING_BASE,
    methods=_READING_METHODS,
    lessons=_SCHOOL,
    train=[
        *_EXERCISES,
        *_all_asked(((1024, 16), (4096, 64)), "niah_multikey_2"),
        *_all_asked(((1024, 8), (4096, 32)), "niah_multikey_3"),
        *_parts(_NEEDLES, (256, 1024, 4096)),
    ],
    tests=_parts(_NEEDLES, (4096, 16384), samples=32)
    + _parts(_NEEDLES, (65536,), samples=40)
    + _parts(
        ("niah_single_1", "niah_single_2", "niah_multikey_1"), (2**18, 2**20), samples=8
    ),
)

# The same as it was at first, lists of 96 blocks and windows with sinks: at 65,536 tokens those that answer are refused much of what
# they chose, and who learned variables by their place in the text loses them (LOG.md).
NEEDLES_96 = dataclasses.replace(
    NEEDLES,
    base=_READING_BASE | _knobs("index", J=96) | _knobs("model", window_sinks=True),
    methods=_READING_METHODS
    | {
        "minmax_6": _READING_METHODS["minmax_6"] | _knobs("index", J=128),
        "window": _READING_METHODS["window"] | _reading("w", 256, "rrrrr"),
    },
)


# Needles on two CPU cores, half an hour a cell, less where the start is shared: an eighth of the lengths, 10M tokens.
NEEDLES_SMALL = quality_parts.Suite(
    base=_READING_BASE
    | {
        **_knobs("model", D=128, K=32, F=256, dtype="float32"),
        **_knobs("index", C=8, query_block=16, J=98, store="float32"),
        **_knobs("index", open_tokens=8, sink_tokens=8),
        **_knobs("data", T=512),
        **_knobs("train", steps=1200, learning_rate=3e-3, start_steps=840),
    },
    methods={
        "window": _reading("w", 216, "rrrrr", window=32) | _ANEW,
        "rnope": _reading("d", 32, window=32),
        **{
            name: _READING_METHODS[name] | _reading("b", 32, window=32)
            for name in ("bookmark", "exact_shortlist", "mean_key", "minmax")
        },
    },
    lessons=((0.1, _LESSONS), (0.35, _EXERCISES)),
    train=[
        *_EXERCISES,
        *_all_asked(((256, 4), (512, 8)), "niah_multikey_2"),
        *_all_asked(((512, 4),), "niah_multikey_3"),
        *_parts(_NEEDLES, (256, 512)),
    ],
    tests=_parts(_NEEDLES, (512, 2048, 8192), samples=32),
    seeds=(0,),
)
