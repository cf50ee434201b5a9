"""The tables of `experiments.quality` as data: which methods learn what, and where they are tested.

A method is a change of knobs (`experiments/quality_methods.py`). All methods of a suite have the same parameters;
`indexer` has up to 3% more, `nsa` up to 0.1%. The means that `nsa` reads of all blocks are counted as attended tokens.
"""

from experiments import (
    quality_ablations,
    quality_methods,
    quality_parts,
    quality_texts,
)

_knobs, _layers = quality_methods.knobs, quality_methods.layers
_selectors, _patterns = quality_methods.selectors, quality_methods.patterns
_learned, _grouped = quality_methods.learned, quality_methods.grouped
MEAN_KEY, MINMAX = quality_methods.MEAN_KEY, quality_methods.MINMAX


def _parts(tasks, lengths, samples=0, **options):
    return [
        quality_parts.Part(task, n, options, samples) for n in lengths for task in tasks
    ]


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


# Texts of RULER's kind: 3.3M parameters, trained on up to 4K tokens, 328M in a cell. Who begins with them keeps guessing
# digits: so recall comes first, then texts that ask for all of their needles, and both stay in the mix. Two pairs of layers as in recall:
# with one, or with two layers of windows before one, keys of two tokens are learned slowly or not at all. All that select
# begin as dense attention, for 4K tokens are cheap to read whole: selectors get the same heads, learned as fast as dense.
_READING_BASE = {
    **_knobs("model", D=256, H=4, G=4, K=64, F=704, V=512, L=4, remat="none"),
    **_knobs("index", A=4, J=96, R=4, store="bfloat16"),
    **_knobs("data", B=16, T=4096, passkey_share=0.0),
    **_knobs("train", steps=5000, learning_rate=2e-3, warmup_steps=50),
    **quality_methods.started("sdsd", 3500),
}
_ANEW = quality_methods.started("", 0)


def _reading(kind, tokens=64, positions="rnrn"):
    """A layer that reads 2 or 4 tokens before each of a kind."""
    return _layers(f"s{kind}s{kind}", (2, tokens, 4, tokens), positions)


_EXACT = _reading("b") | _knobs("index", store="float32")
"""For those whose scores have gradients."""

# How many blocks stay open depends on how alike neighbours choose; 256 tokens of window are a guess at a bookmark layer's
# budget, to be set by the attended tokens that the first cell reports.
_READING_METHODS = {
    "dense": _reading("d") | _ANEW,
    "window": _reading("w", 256, "rrrr") | _knobs("index", sink_tokens=0) | _ANEW,
    "streaming": _reading("w", 256, "rrrr") | _ANEW,
    "irope": _layers("scsd", (2, 64, 4, 64), "rrrn")
    | _knobs("model", chunk_tokens=512)
    | _ANEW,
    **_selectors(_reading("b"), A=4),
    "points_8": _reading("b") | _knobs("index", R=8),
    "moba": _reading("b", 16, "rrrr")
    | MEAN_KEY
    | _knobs("index", A=15, J=256, open_tokens=1, sink_tokens=0),
    **{
        name: _reading("b") | knobs
        for name, knobs in _patterns(A=10, stride=10).items()
    },
    "anew": _reading("b") | _ANEW,
    **_learned(_EXACT),
    **_grouped(_EXACT),
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
    **{
        name: _READING_METHODS[name]
        for name in (
            *("dense", "window", "irope"),
            *("bookmark", "anew", "mean_key", "biased"),
        )
    },
    "rope": _reading("d", positions="rrrr") | _ANEW,
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
    "needles": NEEDLES,
    "mqar_small": MQAR_SMALL,
    "hops": HOPS,
    "hops_small": HOPS_SMALL,
    "lm": quality_texts.LM,
    "setmm": quality_texts.SETMM,
    "rot": ROT,
    "ablations": quality_ablations.KNOBS,
    "scaling": quality_ablations.SCALING,
    "layers": quality_ablations.LAYERS,
}
