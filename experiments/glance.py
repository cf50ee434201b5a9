"""The README's one table: what the results say in a line each, with what stands beside it. Called by `tables`."""

import statistics

from experiments import record


def table() -> str:
    """A row for each claim; its command stands in RESULTS.md under the table of the same results."""
    lines = ["| what | bookmarks | beside it | on |", "|---|---|---|---|"]
    for what, ours, others, device in (
        _text(),
        _recall(),
        _hops(),
        _pretrained(),
        _passkeys(2**17, 8192, ""),
        _passkeys(2**20, 8192, ", read by blocks", granularity="block", A=8),
        *_needles(),
        _passkeys(
            *(10 * 2**20, 16384, ", asked by the flat route"),
            window_sinks=True,
            answer_route="flat",
            answer_X=0,
        ),
        _kernel(),
        _layer(),
        _training(),
        _reading(),
        _published(),
    ):
        lines.append(f"| {what} | {ours} | {others} | {device} |")
    return "\n".join(lines)


def _rows(name, **wanted):
    """Records of a result file with these values."""
    rows = record.read(name)["records"]
    return [row for row in rows if wanted.items() <= row.items()]


def _score(method, **wanted):
    """Mean over seeds of a method of `experiments.quality`."""
    rows = _rows("quality", method=method, **wanted)
    return f"{statistics.mean(row['score'] for row in rows):.3f}"


def _read(**wanted):
    """Attended tokens of bookmarks and of dense attention, means over layers."""
    bookmark, dense = (
        _rows("quality", method=name, **wanted)[0]["attended_tokens"]
        for name in ("bookmark", "dense")
    )
    return f"{bookmark:,.0f} of {dense:,.0f} tokens read"


def _beside(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _short(device):
    return device.removeprefix("1 x ").removeprefix("NVIDIA ").split()[0]


def _text():
    where = {"suite": "lm", "task": "bits_per_byte", "length": 32768}
    others = {name: _score(name, **where) for name in ("dense", "mean_key", "window")}
    what = f"bits a byte of 32,768-byte rows, trained on 8,192, {_read(**where)}"
    [device] = {row["device"] for row in _rows("quality", method="bookmark", **where)}
    return what, _score("bookmark", **where), _beside(others), _short(device)


def _recall():
    where = {"suite": "mqar", "task": "mqar num_pairs=256", "length": 1024}
    others = {name: _score(name, **where) for name in ("dense", "mean_key", "window")}
    what = f"recall of 256 pairs, {_read(**where)}"
    device = _rows("quality", method="bookmark", **where)[0]["device"]
    return what, _score("bookmark", **where), _beside(others), _short(device)


def _hops():
    where = {"suite": "hops", "task": "mqar num_pairs=64 hops=2", "length": 256}
    ours = _rows("quality", method="ask_again", **where)
    others = {
        shown: _score(name, **where)
        for shown, name in (
            ("links", "links_1"),
            ("two bookmark layers", "two_layers"),
            ("one dense layer", "dense"),
        )
    }
    what = (
        f"two hops among 64 pairs, one bookmark layer that asks again ({len(ours)} seeds), a guess is"
        f" {ours[0]['chance']:.3f}"
    )
    return (
        what,
        f"{_mean(ours, 'score'):.3f}",
        _beside(others),
        _short(ours[0]["device"]),
    )


def _needles():
    """A line for each task that tells methods apart, by the seeds that all of them were trained with."""
    names = {
        "min-max": "minmax_6",
        "representatives": "representatives",
        "NSA": "nsa",
    }
    for task, said in (
        ("niah_multikey_2", "a needle among 5,400 alike, keys of two words"),
        ("niah_multikey_3", "a needle among 3,400 alike, keys of eight digits"),
        ("niah_multiquery", "four needles asked for at once"),
        ("variable_tracking", "a chain of five variables"),
    ):
        where = {"suite": "needles", "task": task, "length": 65536}
        ours, *others = (
            _rows("quality", method=name, **where)
            for name in ("exact_shortlist", *names.values())
        )
        seeds = set.intersection(
            *({row["seed"] for row in rows} for rows in (ours, *others))
        )
        scores = [row["score"] for row in ours]
        ours, *others = (
            [row for row in rows if row["seed"] in seeds] for rows in (ours, *others)
        )
        beside = {
            f"{shown} ({_mean(rows, 'attended_tokens'):,.0f} read)": f"{_mean(rows, 'score'):.3f}"
            for shown, rows in zip(names, others)
        }
        what = (
            f"{said}, 65,536 tokens, trained on 4,096 (seed {', '.join(map(str, sorted(seeds)))}), by a shortlist of"
            f" exact keys, {_mean(ours, 'attended_tokens'):,.0f} tokens read"
        )
        score = f"{_mean(ours, 'score'):.3f}"
        if len(scores) > len(seeds):
            score += f" ({len(scores)} seeds: {min(scores):.3f} to {max(scores):.3f})"
        yield what, score, _beside(beside), _short(ours[0]["device"])


def _mean(rows, name):
    return statistics.mean(row[name] for row in rows)


def _pretrained():
    budget, text = 832, "set.mm"
    [dense] = _rows("pretrained", text=text, method="dense")

    def over(method):
        [row] = _rows("pretrained", text=text, method=method, budget=budget)
        return f"+{row['nats'] / dense['nats'] - 1:.1%}"

    names = {"nsa": "mean key of 64", "nsa16": "of 16", "window": "window"}
    others = {shown: over(name) for name, shown in names.items()}
    what = f"nats over dense, SmolLM2-135M untrained, {budget} tokens, {text}"
    [row] = _rows("pretrained", text=text, method="bookmark", budget=budget)
    return what, over("bookmark"), _beside(others), _short(row["device"])


def _passkeys(tokens, trained, how, **bookmark_only):
    where = {"tokens": tokens, "store": "model"}
    where |= {"trained_tokens": trained, "trained_steps": 4500}

    def found(kind, **more):
        rows = _rows("passkey_long", kind=kind, **where, **more)
        return f"{statistics.mean(row['accuracy'] for row in rows):.0%}"

    texts = sum(
        row["samples"]
        for row in _rows("passkey_long", kind="bookmark", **where, **bookmark_only)
    )
    what = f"passkeys in {texts} texts of {tokens:,} tokens, all depths, trained on {trained:,}{how}"
    device = _rows("passkey_long", kind="bookmark", **where)[0]["device"]
    beside = f"window {found('window')}"
    return what, found("bookmark", **bookmark_only), beside, _short(device)


def _kernel():
    where = {"part": "time", "case": "128x128", "length": 131072, "pass": "forward"}
    [ours] = _rows("kernels_h100", implementation="mosaic_gpu", **where)
    [flex] = _rows("kernels_h100", implementation="flex", **where)
    what = "block-sparse forward at 131,072 tokens, TFLOP/s of listed tiles"
    others = {
        "cuDNN dense": f"{ours['tflops'] / ours['of_cudnn']:.0f}",
        "FlexAttention": f"{flex['tflops']:.0f}",
    }
    return what, f"{ours['tflops']:.0f}", _beside(others), _short(ours["device"])


def _layer():
    where = {"part": "end_to_end", "length": 2**20, "pass": "forward"}
    rows = _rows("kernels_h100", implementation="mosaic_gpu", **where)
    ours = min(rows, key=lambda row: row["ms"])
    [dense] = _rows("kernels_h100", implementation="cudnn", **where)
    route = ours["route"].replace("-max", ", best points")
    what = f"a layer of 1,048,576 tokens: index, route ({route}), attend"
    others = f"cuDNN dense {dense['ms']:,.0f} ms"
    return what, f"{ours['ms']:.0f} ms", others, _short(ours["device"])


def _training():
    rows = _rows("train_1m", tokens=2**20, kind="bookmark")
    row = max(rows, key=lambda row: row["tokens_per_s"])
    what = "training, 28M parameters, rows of 1,048,576 tokens"
    ours = (
        f"{row['tokens_per_s'] / 1e6:.2f}M tokens/s, {row['peak_bytes'] / 1e9:.0f} GB"
    )
    [dense] = _rows("train_1m", kind="dense")
    others = f"dense {dense['tokens_per_s']:,.0f} tokens/s, rows of {dense['tokens']:,}, {_short(dense['device'])}"
    return what, ours, others, _short(row["device"])


def _reading():
    rows = _rows("decode", tokens=10 * 2**20, kind="bookmark", granularity="block")
    row = max(rows, key=lambda row: row["prefill_tokens_per_s"])
    what = "reading 10,485,760 tokens by blocks, then answering"
    ours = f"{row['prefill_tokens_per_s'] / 1e6:.2f}M tokens/s, {row['ms_per_token']:.2f} ms a token"
    return what, ours, "", _short(row["device"])


def _published():
    where = {"tokens": 2**17, "tokens_a_call": 8}

    def figures(kind):
        [row] = _rows("pretrained_speed", kind=kind, **where)
        rate, ms = row["prefill_tokens_per_s"], row["ms_per_token"]
        return f"{rate:,.0f} tokens/s, {ms:.1f} ms a token", row["device"]

    (ours, device), (dense, _) = map(figures, ("pooled", "dense"))
    what = "reading 131,072 tokens, then answering, SmolLM2-135M without the exact step"
    return what, ours, f"dense {dense}", _short(device)
