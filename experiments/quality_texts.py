"""Suites whose methods learn from text, as data."""

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
        "bookmark_rope": _layers("wwwb", (*_LOCAL, 256), "rrrr"),
        **quality_methods.learned(_layers("wwwb", (*_LOCAL, 256)), "wwwd", 100),
    },
    train=[quality_parts.Part("text", 8192)],
    tests=[
        quality_parts.Part("text", 8192, samples=32),
        quality_parts.Part("text", 32768, samples=8),
    ],
)
