"""Suites whose methods learn from text, as data."""

import itertools

from experiments import quality_methods, quality_parts

_knobs, _layers = quality_methods.knobs, quality_methods.layers

# Text: configs/small.py's layers at two thirds of its width, with twice the choices: a bookmark layer reads at most an eighth
# of 8K tokens. All begin as windows, as there. 66M bytes a cell; the score is bits per byte, less is better.
_LOCAL = (256, 256, 256)
_WIDE = (*_LOCAL, 1024)
LM = quality_parts.Suite(
    base={
        **_knobs("model", D=256, H=4, G=2, K=64, F=704, L=8, remat="none"),
        **_knobs("index", A=8, J=128),
        **_knobs("data", B=8, T=8192),
        **_knobs("train", steps=1000, learning_rate=2e-3, warmup_steps=100),
        **_knobs("train", start_steps=150, start_pattern="wwww"),
        **_knobs("train", start_window_tokens=_WIDE),
    },
    methods={
        "dense": _layers("wwwd", (*_LOCAL, 256)),
        "window": _layers("wwww", _WIDE, "rrrr"),
        **quality_methods.selectors(_layers("wwwb", (*_LOCAL, 256)), A=8),
        "exact_shortlist": _layers("wwwb", (*_LOCAL, 256)) | _knobs("index", R=8, X=32),
        "without_sinks": _layers("wwwb", (*_LOCAL, 256))
        | _knobs("model", window_sinks=False),
        "bookmark_rope": _layers("wwwb", (*_LOCAL, 256), "rrrr"),
        "started": _layers("wwwb", (*_LOCAL, 256))
        | quality_methods.started("wwwd", 100),
        **quality_methods.learned(_layers("wwwb", (*_LOCAL, 256))),
    },
    train=[quality_parts.Part("text", 8192)],
    tests=[
        quality_parts.Part("text", 8192, samples=32),
        quality_parts.Part("text", 32768, samples=8),
    ],
)


# The same on set.mm, asked for the labels that held-out proofs cite, by the distance since they were last mentioned: up to
# 128 times the trained length. Most of them can be known by heart, so those that training mentions fewer than ten times are
# asked alone, too: 6% to 10% of all.
_SAMPLES = {2**13: 64, 2**16: 16, 2**20: 2}
_DISTANCES = (0, 2**10, 2**13, 2**16, 2**20)
SETMM = quality_parts.Suite(
    base=LM.base | _knobs("data", source="setmm"),
    methods={
        name: LM.methods[name]
        for name in ("dense", "window", "bookmark", "mean_key", "minmax")
    },
    train=LM.train,
    tests=[
        LM.tests[0],
        *(
            quality_parts.Part(
                "setmm_recall",
                num_tokens,
                {"first_distance": first, "last_distance": last, **only},
                samples,
            )
            for only in ({}, {"trained_below": 10})
            for num_tokens, samples in _SAMPLES.items()
            for first, last in itertools.pairwise(_DISTANCES)
            if last <= num_tokens
        ),
    ],
)
