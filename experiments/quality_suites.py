"""The tables of `experiments.quality` as data: which methods learn what, and where they are tested.

A method is a change of knobs (`experiments/quality_methods.py`). All methods of a suite have the same parameters;
`indexer` has up to 3% more, `nsa` up to 0.1%. The means that `nsa` reads of all blocks are counted as attended tokens.
"""

from experiments import (
    quality_ablations,
    quality_methods,
    quality_needles,
    quality_parts,
    quality_texts,
)

_knobs, _layers = quality_methods.knobs, quality_methods.layers
_selectors, _patterns = quality_methods.selectors, quality_methods.patterns
_learned, _grouped = quality_methods.learned, quality_methods.grouped
MEAN_KEY, MINMAX = quality_methods.MEAN_KEY, quality_methods.MINMAX


# Associative recall: in the second layer each token reads 48 (window 16 and 4 blocks of 8), the budget of Zoology's NSA
# configuration; in the first its own and the one before it, where Zoology has a convolution of three. 1.4M parameters, most
# of them embeddings; 131M tokens a cell.
_MQAR_METHODS = {
    "dense": _layers("sd", (2, 16)),
    "window": _layers("sw", (2, 48)),
    "streaming": _layers("sw", (2, 40)) | _knobs("index", sink_tokens=8),
    **_selectors(_layers("sb", (2, 16)), A=4),
    "moba": _layers("sb", (2, 8), "rr") | MEAN_KEY | _knobs("index", A=5, J=96),
    "quest": _layers("sb", (2, 8), "rr") | MINMAX | _knobs("index", A=5, J=96),
    **{
        name: _layers("sb", (2, 16)) | knobs
        for name, knobs in _patterns(A=4, stride=8).items()
    },
    "started": _layers("sb", (2, 16)) | quality_methods.started("sd", 200),
    **_learned(_layers("sb", (2, 16))),
    **_grouped(_layers("sb", (2, 16))),
}
MQAR = quality_parts.Suite(
    base=quality_ablations.RECALL_BASE,
    methods=_MQAR_METHODS,
    train=quality_ablations.RECALL_TRAIN,
    tests=[
        quality_parts.Part("mqar", length, {"num_pairs": pairs}, samples=1024)
        for length, pairs in (
            *((64, 4), (64, 8), (64, 16), (128, 32)),
            *((256, 64), (512, 128), (1024, 256)),
        )
    ],
)


# Two hops, the end only, by the model of associative recall: its one bookmark layer may follow links, or ask again (1% more
# parameters; both readings are counted); or there are two such layers (12% more), or two pairs (24%). 131M tokens a cell.
_ONE = _layers("sb", (2, 16))


def _linked(hops, **values):
    return _ONE | _knobs("index", route="graph", P=4, beam=2, hops=hops, **values)


HOPS = quality_parts.Suite(
    base=quality_ablations.RECALL_BASE,
    methods={
        "dense": _layers("sd", (2, 16)),
        "window": _layers("sw", (2, 48)),
        "bookmark": _ONE,
        "links_1": _linked(1),
        "links_2": _linked(2),
        "parents_1": _linked(1, children=0),
        "parents_2": _linked(2, children=0),
        "ask_again": _ONE | _knobs("model", ask_again=True),
        "ask_again_biased": _ONE | _knobs("model", ask_again=True, score_weight=1.0),
        "links_1_ask_again": _linked(1) | _knobs("model", ask_again=True),
        "two_layers": _layers("sbb", (2, 16, 16), "rnn") | _knobs("model", L=3),
        "two_pairs": _layers("sbsb", (2, 16) * 2, "rnrn") | _knobs("model", L=4),
        "started": _ONE | quality_methods.started("sd", 200),
        **_learned(_ONE),
    },
    train=[
        quality_parts.Part("mqar", length, {"num_pairs": pairs, "hops": hops})
        for hops in (1, 2)
        for length, pairs in ((64, 4), (128, 16), (256, 32), (256, 64))
    ],
    tests=[
        quality_parts.Part("mqar", length, {"num_pairs": pairs, "hops": hops}, 1024)
        for hops in (2, 1)
        for length, pairs in ((256, 64), (128, 16), (512, 128), (1024, 256))
    ],
)


# The same two on two CPU cores, smaller: a minute or two a cell where nobody else uses them.
_SMALL = quality_ablations.RECALL_BASE | {
    **_knobs("model", D=64, K=32, F=128, V=1024, dtype="float32"),
    **_knobs("data", B=64, T=128),
    **_knobs("train", warmup_steps=20),
}


def _small(lengths_and_pairs, hops, samples=0):
    return [
        quality_parts.Part("mqar", n, {"num_pairs": m, "hops": h, "V": 1024}, samples)
        for h in hops
        for n, m in lengths_and_pairs
    ]


MQAR_SMALL = quality_parts.Suite(
    base=_SMALL | _knobs("train", steps=300),
    methods={n: _MQAR_METHODS[n] for n in ("dense", "window", "bookmark", "biased")}
    | {"best_points": _MQAR_METHODS["bookmark"] | _knobs("index", point_pool="max")},
    train=_small(((64, 4), (128, 8), (128, 16), (128, 32)), hops=(1,)),
    tests=_small(((128, 32), (256, 64), (512, 128)), hops=(1,), samples=64),
    seeds=(0,),
)
HOPS_SMALL = quality_parts.Suite(
    base=_SMALL | _knobs("train", steps=600),
    methods={
        n: HOPS.methods[n] for n in ("bookmark", "ask_again_biased", "two_layers")
    },
    train=_small(((64, 4), (128, 16)), hops=(1, 2)),
    tests=_small(((64, 4), (128, 16), (256, 32)), hops=(2, 1), samples=64),
    seeds=(0,),
)


# Seconds on two CPU cores: one token among noise, asked for up to 63 tokens later. Bookmarks reach it anywhere; the two
# layers of windows, which read as many tokens, some 47 back.
SMOKE = quality_parts.Suite(
    base={
        **_knobs("model", D=32, H=2, G=2, K=16, F=32, V=32, L=2, remat="none"),
        **_knobs("model", dtype="float32"),
        **_knobs("index", C=8, query_block=16, J=40, A=2, sink_tokens=0, R=2),
        **_knobs("index", open_tokens=1, route_tokens=64),
        **_knobs("data", B=16, T=64, passkey_share=0.0),
        **_knobs("train", steps=200, learning_rate=1e-2, warmup_steps=10),
    },
    methods={
        "dense": _layers("wd", (16, 16)),
        "window": _layers("ww", (16, 32)),
        "bookmark": _layers("wb", (16, 16)),
    },
    train=[
        quality_parts.Part("selective_copy", length, {"num_data": 1})
        for length in (32, 64)
    ],
    tests=[quality_parts.Part("selective_copy", 64, {"num_data": 1}, samples=64)],
    seeds=(0,),
)

SUITES = {
    "smoke": SMOKE,
    "mqar": MQAR,
    "needles": quality_needles.NEEDLES,
    "needles_96": quality_needles.NEEDLES_96,
    "needles_small": quality_needles.NEEDLES_SMALL,
    "mqar_small": MQAR_SMALL,
    "hops": HOPS,
    "hops_small": HOPS_SMALL,
    "lm": quality_texts.LM,
    "setmm": quality_texts.SETMM,
    "ablations": quality_ablations.KNOBS,
    "scaling": quality_ablations.SCALING,
    "layers": quality_ablations.LAYERS,
}
