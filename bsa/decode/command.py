"""A book and a question to an answer on the terminal: `--mode=generate` of `bsa.main`."""

import contextlib
import dataclasses
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from bsa.decode import cache as caches
from bsa.decode import explain, files, generate, settings, step, vocabulary
from bsa.model import settings as model_settings

SPARE_TOKENS = 4096
"""Room for later questions to a book, where no capacity is asked for."""

DEFAULTS = (
    dataclasses.asdict(settings.SamplingSettings())
    | dataclasses.asdict(settings.CacheSettings(1))
    | dataclasses.asdict(settings.ReadingSettings())
    | {"capacity_tokens": 0, "piece_tokens": 0}
)
"""Fields of the three kinds of settings. A capacity of 0 is what text, question and answer need, and SPARE_TOKENS; pieces of 0
tokens are as long as suits the device. An answer ends with the first of the strings `stop` that it contains."""

ACCELERATOR_PIECE_TOKENS = 16384
"""The search of a key/value head then has 128 thread blocks, about as many as a Hopper card has multiprocessors."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for; see `prepare`.

    Attributes:
        book_T: tokens of the text, int32.
        question: follows it as it is; may be empty, then the text is continued.
        question_T: its tokens.
        words: by which both were split, and the answer is written.
        stop: strings that end an answer.
        save_cache: file for what was read, before the question; "": none.
        load_cache: such a file, of this text or of its beginning; "": none.
        page: HTML file of what the answer rests on; "": none.
    """

    book_T: np.ndarray
    question: str
    question_T: np.ndarray
    words: vocabulary.Vocabulary
    stop: tuple[str, ...]
    save_cache: str
    load_cache: str
    page: str
    reading: settings.ReadingSettings
    room: settings.CacheSettings
    sampling: settings.SamplingSettings


def prepare(
    prompt_file: str,
    options: dict,
    *,
    question: str,
    words: vocabulary.Vocabulary = vocabulary.BYTES,
    **paths,
) -> Request:
    """Reads the text and checks what can be checked without a model.

    Text and question are split apart, so that a book that was read serves any question.

    Args:
        options: the fields of `DEFAULTS`.
        words: the model's.
        paths: `save_cache`, `load_cache` and `page`.
    Raises:
        ValueError, OSError: input that cannot work.
    """
    options = dict(options)
    book_T = np.asarray(words.begin(_read_text(prompt_file)), np.int32)
    question_T = np.asarray(words.go_on(question), np.int32)
    room = _pop(options, settings.CacheSettings)
    reading = _pop(options, settings.ReadingSettings)
    stop = tuple(options["stop"])
    if not all(stop):
        raise ValueError("decode: an empty stop sequence would end every answer")
    options["stop"] = tuple((token,) for token in words.end)
    sampling = settings.SamplingSettings(**options)
    needed = len(book_T) + len(question_T) + sampling.max_tokens
    room["capacity_tokens"] = room["capacity_tokens"] or needed + SPARE_TOKENS
    room["piece_tokens"] = room["piece_tokens"] or _choose_piece(
        room["store"], room["kept_tokens"]
    )
    return Request(
        book_T=book_T,
        question=question,
        question_T=question_T,
        words=words,
        stop=stop,
        reading=settings.ReadingSettings(**reading),
        room=settings.CacheSettings(**room),
        sampling=sampling,
        **paths,
    )


def _pop(options, kind):
    """Takes a dataclass' fields out of the options."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: options.pop(name) for name in names}


def _choose_piece(store, kept_tokens):
    """Tokens that fill an accelerator, where pieces need not share little room with blocks that are kept or fetched."""
    if jax.default_backend() == "cpu" or store == "host" or kept_tokens:
        return settings.CacheSettings(1).piece_tokens
    return ACCELERATOR_PIECE_TOKENS


def run(params, model: model_settings.ModelSettings, request: Request) -> None:
    """Reads, answers on stdout, logs figures.

    Ctrl-C while reading saves what was read, if there is a file to save it in; the same command with that file as
    `load_cache` goes on.

    Raises:
        ValueError, OSError: input that cannot work.
    """
    sampling = request.sampling
    model, answering = request.reading.models(model)
    prompt_T = np.concatenate([request.book_T, request.question_T])
    # On no mesh: the fresh cache is on none, and a step that changed that would compile twice.
    params = jax.tree.map(jnp.asarray, jax.device_get(params))
    keep = request.save_cache or request.load_cache
    fingerprint = files.fingerprint(params, model) if keep else ""
    token_BT = prompt_T[None]
    # The text's last token is read with the question, so that an answer can always begin with a token to read.
    book_BT = token_BT[:, : len(request.book_T) - 1]
    if request.load_cache:
        cache = files.load(request.load_cache, book_BT, model, fingerprint)
    else:
        cache = caches.empty(model, request.room, 1)
    caches.check(answering, cache.room)
    step.check_room(cache, len(prompt_T) + sampling.max_tokens)

    already = int(cache.length_B[0])
    cache, rate = _read(params, book_BT[:, already:], cache, model)
    length = int(cache.length_B[0])
    if request.save_cache and length:
        files.save(request.save_cache, cache, book_BT[:, :length], fingerprint)
    if length < book_BT.shape[1]:
        kept = f"saved, go on with --load_cache={request.save_cache}"
        logging.info(
            "stopped after %s of %s tokens; %s",
            f"{length:,}",
            f"{len(prompt_T):,}",
            kept if request.save_cache else "nothing is saved without --save_cache",
        )
        return
    if length < len(prompt_T) - 1:
        piece = None if answering == model else step.QUESTION_TOKENS
        rest_BT = token_BT[:, length:-1]
        _, cache = step.prefill(params, rest_BT, cache, answering, piece_tokens=piece)
    _answer(params, prompt_T, cache, answering, request, rate)


def _read_text(path: str) -> str:
    """A file's text, which must be UTF-8, and not empty."""
    if not path:
        raise ValueError("--prompt_file=FILE is needed: the text to read")
    text = pathlib.Path(path).read_bytes()
    if not text:
        raise ValueError(f"{path} is empty; a prompt needs at least one character")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is {text[error.start]:#04x}; convert it first"
        ) from error


def _read(params, token_BT, cache, model):
    """Prefill with progress, until the end or Ctrl-C: the cache, and tokens a second."""
    clock, already = _Clock(token_BT.shape[1]), int(cache.length_B[0])
    if not token_BT.shape[1]:
        return cache, 0.0
    with _note_interrupt() as is_interrupted:

        def after_piece(logits_BV, cache):
            jax.block_until_ready(logits_BV)
            clock.tick(int(cache.length_B[0]) - already)
            return is_interrupted()

        _, cache = step.prefill(params, token_BT, cache, model, after_piece=after_piece)
    return cache, clock.rate


class _Clock:
    """Logs progress and the time left, now and then.

    Attributes:
        rate: tokens a second; the first piece, for which the step is compiled, counts only while it is the only one.
    """

    EVERY_S = 5.0

    def __init__(self, total):
        self.rate = 0.0
        self._total = total
        self._begin = (0, time.monotonic())
        self._logged = 0.0

    def tick(self, done):
        now = time.monotonic()
        self.rate = (done - self._begin[0]) / max(now - self._begin[1], 1e-9)
        if not self._begin[0]:
            self._begin = (done, now)
        if now - self._logged < self.EVERY_S and done < self._total:
            return
        self._logged = now
        logging.info(
            "read %s of %s tokens, %s tokens/s, %.0f s left",
            f"{done:,}",
            f"{self._total:,}",
            f"{self.rate:,.0f}",
            (self._total - done) / self.rate,
        )


@contextlib.contextmanager
def _note_interrupt():
    """Yields a function that says whether Ctrl-C was pressed; a step is never cut short, since it owns the cache."""
    asked = False

    def note(signum, frame):
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(params, prompt_T, cache, model, request, rate):
    """Streams the answer to stdout, then logs figures and what it rests on."""
    writer = vocabulary.Writer(request.words)
    readings, times = [], [time.monotonic()]
    last_B = prompt_T[-1:]
    for drawn in generate.stream(
        params, last_B, cache, model, request.sampling, weigh=bool(request.page)
    ):
        readings.append(drawn.readings)
        sys.stdout.write(writer.add(int(drawn.token_B[0])))
        sys.stdout.flush()
        times.append(time.monotonic())
        if any(stop in writer.text for stop in request.stop):
            break
    sys.stdout.write(writer.close() + "\n")
    # The first call waits for the step to be compiled; it counts only while it is the only one.
    num, first = len(times) - 1, max(1, request.sampling.tokens_a_call)
    warm = first if num > first else 0
    ms = 1000 * (times[-1] - times[warm]) / (num - warm)
    logging.info(
        "read %s tokens/s, %.1f ms a token, %s bytes of cache, %.1f%% of blocks read",
        f"{rate:,.0f}",
        ms,
        f"{caches.num_bytes(drawn.cache):,}",
        100 * _share_read(readings, len(prompt_T), model),
    )
    if request.page:
        found = explain.passages(
            readings, drawn.cache, prompt_T, model, request.words.decode
        )
        for line in explain.as_text(found):
            logging.info("%s", line)
        page = explain.as_page(found, request.question, writer.text)
        pathlib.Path(request.page).write_text(page, encoding="utf-8")


def _share_read(readings, num_tokens, model):
    """Of the blocks so far, how many a token reads in a bookmark layer; 0 for a model without any."""
    shares = [
        (np.asarray(reading.block_id_BGJ) >= 0).sum(-1).mean()
        / ((num_tokens + number) // model.index.C + 1)
        for number, of_token in enumerate(readings)
        for reading in of_token
        if reading is not None
    ]
    return float(np.mean(shares)) if shares else 0.0
