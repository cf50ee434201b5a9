"""The command: reads flags, prepares a run, trains or evaluates it, and says how it went.

    python -m bsa.main --config=configs/tiny.py --workdir=runs/tiny [--mode=train|evaluate] [--config.model.D=256 ...]

Training goes on from the newest checkpoint in the workdir. On several hosts, run the same command on each.

    python -m bsa.main --mode=generate --workdir=runs/tiny --prompt_file=BOOK --question="..." [--decode.temperature=0.7 ...]

answers with a trained model, in the config that its workdir keeps; with --config=configs/smollm2.py and no workdir, a
published one answers.
"""

import json
import logging as std_logging
import pathlib
import sys

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from bsa.decode import command
from bsa.parallel import mesh as meshes
from bsa.pretrained import checkpoint, parameters
from bsa.tasks import sources
from bsa.train import evaluate, loop, settings, step, transfer

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/, with its argument if it takes one: configs/small.py:dense.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, metrics and figures; made if missing."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "generate"],
    "What to do; training evaluates at its end.",
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", "", "A UTF-8 text to read.")
_QUESTION = flags.DEFINE_string(
    "question", "", "Follows the text as it is, and is answered."
)
_SAVE_CACHE = flags.DEFINE_string(
    "save_cache", "", "File for what was read, so that it is read only once."
)
_LOAD_CACHE = flags.DEFINE_string(
    "load_cache", "", "Such a file, of the same text or of its beginning."
)
_EXPLAIN = flags.DEFINE_string(
    "explain", "", "HTML file of the passages that the answer rests on."
)

BOUND_TO_CHECKPOINT = {
    "train": ("seed", "model", "index", "data"),
    "evaluate": ("model",),
}
"""Parts of a config that a workdir keeps, by mode: its checkpoints mean nothing under others. What is evaluated may be
longer than what was trained on, and read in another way.
"""


def main(argv: list[str]) -> None:
    """Prepares, runs, reports; input that cannot work ends in one line and exit code 2."""
    if len(argv) > 1:
        _give_up(f"unknown argument {argv[1]!r}; flags begin with --")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_ours_or_urgent)
    meshes.initialize_distributed()
    try:
        if _MODE.value == "generate":
            _generate()
            return
        run, corpus, mesh, workdir = _prepare()
        if run.pretrained.source:
            run, opened = transfer.open_model(run)
            result = transfer.evaluate_model(run, opened, corpus, mesh, workdir)
            logging.info("%s", transfer.summary(result, workdir))
            return
    except (ValueError, OSError) as error:
        _give_up(error)
    if _MODE.value == "train":
        params = loop.train(run, corpus, mesh, workdir)
        if params is None:
            return
    else:
        params, _ = loop.restore_params(run, mesh, workdir)
    result = evaluate.Evaluator(run, corpus, mesh).evaluate(params, workdir)
    logging.info("%s", summary(result, workdir))


def summary(result: dict, workdir: pathlib.Path) -> str:
    """The evaluation as a small table, and where its figures are."""
    rows = [
        ("parameters", f"{result['num_params']:,}"),
        ("held-out bits per byte", f"{result['bits_per_byte']:.3f}"),
        ("share of tokens attended", f"{result['attended_share']:.3f}"),
    ]
    for bucket in result["bits_per_byte_by_position"]:
        where = f"{bucket['first']:,}-{bucket['last']:,}"
        rows.append((f"  at positions {where}", f"{bucket['bits_per_byte']:.3f}"))
    lengths = sorted({cell["tokens"] for cell in result["passkey_accuracy"]})
    for length in lengths:
        cells = [
            cell["accuracy"]
            for cell in result["passkey_accuracy"]
            if cell["tokens"] == length
        ]
        rows.append(
            (f"passkeys found in {length:,} tokens", f"{sum(cells) / len(cells):.0%}")
        )
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>12}" for name, value in rows)
    return f"result\n{table}\n  figures in {workdir / 'figures'}, numbers in {workdir / 'evaluation.json'}"


def _prepare():
    """Everything that can fail because of what the user gave, before anything is written."""
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError("--config=configs/NAME.py and --workdir=DIR are both needed")
    run = settings.from_config(_CONFIG.value)
    if run.pretrained.source and _MODE.value == "train":
        raise ValueError(
            f"pretrained.source={run.pretrained.source!r} can be evaluated and asked, not trained; add --mode=evaluate or "
            "--mode=generate"
        )
    if run.model.V < 256:
        raise ValueError(
            f"model: V={run.model.V}: tokens are bytes, so V must be at least 256"
        )
    mesh = meshes.make_mesh(run.mesh)
    corpus = sources.open_corpus(run.data)
    step.check(run, mesh)
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    _keep_config(json.loads(_CONFIG.value.to_json()), workdir)
    trained_here = _MODE.value == "evaluate" and not run.pretrained.source
    if trained_here and not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{workdir} holds no checkpoints; train first, with the same --config"
        )
    return run, corpus, mesh, workdir


def _generate():
    """Answers with the newest checkpoint of a workdir, or with a published model that the config names."""
    if _CONFIG.value is not None and _CONFIG.value.pretrained.source:
        _generate_published(settings.from_config(_CONFIG.value))
        return
    if _WORKDIR.value is None:
        raise ValueError(
            "--workdir=DIR of a trained model is needed, or --config of a published one"
        )
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir} holds no config.json; train there first")
    kept = _with_tuples(_read_config(workdir / "config.json"))
    run = settings.from_config(ml_collections.ConfigDict(kept))
    request = _request()
    params, _ = loop.restore_params(run, meshes.make_mesh(run.mesh), workdir)
    command.run(params, run.model, request)


def _generate_published(run):
    """Answers with a published model. If its positions go by the text's length, a saved book is bound to the capacity."""
    opened = checkpoint.open_checkpoint(run.pretrained.source)
    request = _request(words=transfer.vocabulary_of(opened))
    model = transfer.fit(run, opened, request.room.capacity_tokens).model
    params = parameters.arrange(parameters.load(opened), model.pattern)
    command.run(params, model, request)


def _request(**words):
    """What the flags ask for."""
    return command.prepare(
        _PROMPT_FILE.value,
        flags.FLAGS.decode.to_dict(),
        question=_QUESTION.value,
        save_cache=_SAVE_CACHE.value,
        load_cache=_LOAD_CACHE.value,
        page=_EXPLAIN.value,
        **words,
    )


def _read_config(path: pathlib.Path) -> dict:
    """The config that a workdir keeps, with the knobs that are newer than it."""
    kept = json.loads(path.read_text())
    completed = settings.complete(kept)
    for part, values in completed.items():
        if isinstance(values, dict):
            later = {k: v for k, v in values.items() if k not in kept.get(part, {})}
            if later:
                logging.info("%s is older than %s: %s", path, part, later)
    return completed


def _with_tuples(values):
    """What JSON made lists of, as tuples."""
    if isinstance(values, dict):
        return {name: _with_tuples(value) for name, value in values.items()}
    return tuple(map(_with_tuples, values)) if isinstance(values, list) else values


def _keep_config(config: dict, workdir: pathlib.Path) -> None:
    """Writes the config into the workdir, or holds the new one to that which its checkpoints were made with.

    Raises:
        ValueError: a part that checkpoints depend on has changed.
        OSError: the workdir cannot be written.
    """
    path = workdir / "config.json"
    if path.exists():
        kept = _read_config(path)
        for part in BOUND_TO_CHECKPOINT[_MODE.value]:
            if kept[part] != config[part]:
                changed = _first_difference(part, kept[part], config[part])
                raise ValueError(
                    f"{workdir} was made with {changed}; use that, or another --workdir"
                )
    elif _MODE.value == "train" and jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=1) + "\n")
        except OSError as error:
            raise OSError(
                f"--workdir={workdir} cannot be written: {error.strerror}"
            ) from error


def _first_difference(part, kept, new):
    """Names one knob that differs, with both values."""
    if not isinstance(kept, dict):
        return f"{part}={kept}, not {new}"
    name = next(name for name in {**kept, **new} if kept.get(name) != new.get(name))
    return f"{part}.{name}={kept.get(name)}, not {new.get(name)}"


def _is_ours_or_urgent(record) -> bool:
    """Libraries log through absl too; only their warnings are worth a line."""
    return record.levelno >= std_logging.WARNING or "/bsa/" in record.pathname


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; what cannot be parsed ends in one line."""
    try:
        # Not at import: a misspelt knob is found, and raised, where the flag is defined.
        config_flags.DEFINE_config_dict(
            "decode",
            ml_collections.ConfigDict(command.DEFAULTS),
            "Room and sampling; see bsa/decode/settings.py.",
        )
        return flags.FLAGS(argv)
    except (
        flags.Error,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        OSError,
    ) as error:
        _give_up(error)


def _give_up(reason) -> None:
    """Ends the program with one line; of a library's traceback, its last."""
    text = str(reason).strip()
    if "Traceback" in text:
        text = text.splitlines()[-1]
    line = " ".join(text.split())
    sys.stderr.write(f"bsa: {line}\n")
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
