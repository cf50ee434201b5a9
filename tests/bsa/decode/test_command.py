"""A book and a question: read once, saved, asked again, stopped and gone on with; and what cannot work."""

import dataclasses
import logging as std_logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from bsa.decode import cache as caches
from bsa.decode import command, explain, files, generate, step, vocabulary
from bsa.decode.settings import CacheSettings, SamplingSettings
from tests.bsa.decode import cases

INDEX = {"route": "chapters", "chapter_levels": 1, "P": 1}
MODEL = dataclasses.replace(cases.bookmarks_only("n", **INDEX), V=256)
ROOM = CacheSettings(320, 64)
BOOK = "".join(f"Line {i} of a book. " for i in range(12)).encode()
OPTIONS = command.DEFAULTS | {"max_tokens": 6} | dataclasses.asdict(ROOM)
NO_PATHS = {"save_cache": "", "load_cache": "", "page": ""}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(BOOK)
    return path


@pytest.fixture
def ask(book, capsys):
    """Runs the command and returns what it answered."""

    def run(question="What?", options=OPTIONS, **paths):
        paths = NO_PATHS | {name: str(path) for name, path in paths.items()}
        request = command.prepare(str(book), options, question=question, **paths)
        command.run(cases.parameters(MODEL), MODEL, request)
        return capsys.readouterr().out

    return run


def test_a_saved_book_gives_the_same_answers(ask, book, tmp_path):
    """Also to another question, and when more of the book is read after loading."""
    saved = tmp_path / "read.npz"
    first = ask(save_cache=saved)
    assert len(first) > 1
    assert ask(load_cache=saved) == first
    assert ask("Why?", load_cache=saved) == ask("Why?")
    book.write_bytes(BOOK + b"One more line.")
    longer = ask(load_cache=saved)
    assert longer == ask()
    book.write_bytes(b"l" + BOOK[1:])
    with pytest.raises(ValueError, match=r"read\.npz is the cache of another text"):
        ask(load_cache=saved)


def test_a_book_read_by_query_blocks_is_the_same_in_any_whole_pieces(ask, tmp_path):
    saved, answers = [tmp_path / f"{name}.npz" for name in "ab"], []
    for path, piece in zip(saved, (64, 32)):
        options = OPTIONS | {"granularity": "block", "piece_tokens": piece}
        answers.append(ask(options=options, save_cache=path))
    assert answers[0] == answers[1]
    with np.load(saved[0]) as ours, np.load(saved[1]) as theirs:
        chosen = [x for x in ours.files if "recent" in x]
        assert chosen
        for name in chosen:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    with pytest.raises(ValueError, match=r"a\.npz is the cache of another model"):
        ask(load_cache=saved[0])
    with pytest.raises(ValueError, match="granularity='page' is not one of token"):
        ask(options=OPTIONS | {"granularity": "page"})


def test_question_and_answer_go_by_a_route_of_their_own(ask, tmp_path):
    """The book is the same for either: only who asks looks further."""
    saved = [tmp_path / f"{name}.npz" for name in "ab"]
    ask(save_cache=saved[0])
    options = OPTIONS | {"answer_route": "flat", "answer_X": 64}
    options |= {"answer_temperature_tokens": 8, "answer_temperature_gain": 0.3}
    answer = ask(options=options, save_cache=saved[1])
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert ask(options=options, load_cache=saved[0]) == answer
    with pytest.raises(ValueError, match="answer_route='near'"):
        ask(options=OPTIONS | {"answer_route": "near"})
    with pytest.raises(
        ValueError, match="store='host'.*set X to 0, and decode.answer_X"
    ):
        ask(options=OPTIONS | {"answer_X": 64, "store": "host"})


def test_an_interrupted_reading_goes_on(ask, tmp_path):
    """Ctrl-C after the first piece keeps that piece; nothing of the answer differs in the end."""

    class Interrupt(std_logging.Handler):
        def emit(self, record):
            if "tokens/s" in record.getMessage():
                signal.raise_signal(signal.SIGINT)

    part, whole, resumed = (tmp_path / f"{name}.npz" for name in "abc")
    answer = ask(save_cache=whole)
    handler, before = Interrupt(), logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().addHandler(handler)
    try:
        assert ask(save_cache=part) == ""
    finally:
        logging.get_absl_logger().removeHandler(handler)
        logging.set_verbosity(before)
    assert ask(load_cache=part, save_cache=resumed) == answer
    with np.load(whole) as ours, np.load(resumed) as theirs, np.load(part) as begun:
        assert ours.files == theirs.files
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        assert begun[".length_B"] == 64


def test_what_cannot_work_is_said_by_name(ask, book, tmp_path):
    saved, broken = tmp_path / "read.npz", tmp_path / "broken.npz"
    ask(save_cache=saved)
    for size in (0, 100, saved.stat().st_size - 100):
        broken.write_bytes(saved.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"broken\.npz is no cache, or a damaged"):
            ask(load_cache=broken)
    flipped = bytearray(saved.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    broken.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"broken\.npz"):
        ask(load_cache=broken)
    other = dataclasses.replace(MODEL, rope_theta=500.0)
    mark = files.fingerprint(cases.parameters(MODEL), other)
    token_BT = np.frombuffer(BOOK, np.uint8)[None]
    with pytest.raises(ValueError, match=r"read\.npz is the cache of another model"):
        files.load(saved, token_BT, other, mark)
    with pytest.raises(FileNotFoundError):
        ask(load_cache=tmp_path / "absent.npz")

    with pytest.raises(
        ValueError, match=f"make one with capacity_tokens={len(BOOK) + 11}"
    ):
        ask(options=OPTIONS | {"capacity_tokens": 100})
    book.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        ask()
    book.write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match="not UTF-8: byte 3 is 0xe9"):
        ask()
    with pytest.raises(ValueError, match="--prompt_file"):
        command.prepare("", OPTIONS, question="?", **NO_PATHS)


def test_characters_are_written_when_they_are_whole():
    """Whatever the tokens: bytes of the text, cut anywhere, and bytes of none."""
    text = "caf\xe9 \u2014 na\xefve\n\U0001f600!\n\nend"
    writer = vocabulary.Writer(vocabulary.BYTES)
    parts = [writer.add(token) for token in text.encode()]
    assert vocabulary.UNKNOWN not in "".join(parts)
    assert "".join([*parts, writer.close()]) == text == writer.text
    broken = vocabulary.Writer(vocabulary.BYTES)
    shown = [broken.add(token) for token in b"a\xc3\xff\xe2\x80"]
    assert shown[0] == "a" and not any(shown[1:3])
    assert "".join([*shown, broken.close()]) == "a\ufffd\ufffd\ufffd"


def test_room_suits_text_and_device(book, monkeypatch):
    def room(**options):
        options = command.DEFAULTS | options
        return command.prepare(str(book), options, question="?", **NO_PATHS).room

    least = len(BOOK) + 1 + command.DEFAULTS["max_tokens"]
    assert room().capacity_tokens >= least
    pieces = [room().piece_tokens]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pieces += [room(**x).piece_tokens for x in ({}, {"store": "host"})]
    assert pieces == [1024, command.ACCELERATOR_PIECE_TOKENS, 1024]
    assert room(piece_tokens=7).piece_tokens == 7


def test_a_prompt_beyond_capacity_leaves_the_cache_as_it_was():
    params, token_BT = cases.parameters(MODEL), np.ones((1, 300), np.int32)
    cache = caches.empty(MODEL, ROOM, 1)
    _, cache = step.prefill(params, token_BT, cache, MODEL)
    for too_many in (token_BT, np.ones((1, 0), np.int32)):
        with pytest.raises(ValueError, match="capacity_tokens=600|prompt is empty"):
            step.prefill(params, too_many, cache, MODEL)
    with pytest.raises(ValueError, match="capacity_tokens=350"):
        sampling = SamplingSettings(max_tokens=50)
        next(generate.stream(params, jnp.ones(1), cache, MODEL, sampling))
    assert int(cache.length_B[0]) == 300
    step.prefill(params, token_BT[:, :20], cache, MODEL)


def test_a_batch_answers_like_its_rows_and_ends_at_stop_sequences():
    """Rows of different lengths; the stop is what the first row would have said third; drawn some tokens a call."""
    params = cases.parameters(MODEL)
    prompts = [BOOK[:50], BOOK[20:57]]

    def answers(prompts, **sampling):
        count_B = np.array([len(prompt) - 1 for prompt in prompts])
        token_BT = np.zeros((len(prompts), count_B.max()), np.int32)
        for row, prompt in enumerate(prompts):
            token_BT[row, : count_B[row]] = list(prompt[:-1])
        cache = caches.empty(MODEL, ROOM, len(prompts))
        _, cache = step.prefill(params, token_BT, cache, MODEL, count_B=count_B)
        last_B = [prompt[-1] for prompt in prompts]
        sampling = SamplingSettings(max_tokens=8, **sampling)
        drawn = list(generate.stream(params, last_B, cache, MODEL, sampling))
        answers = [
            bytes(d.token_B[row] for d in drawn if d.is_live_B[row])
            for row in range(len(prompts))
        ]
        # All but the last token of each answer went into the cache.
        kept_B = [n + len(a) for n, a in zip(count_B, answers)]
        np.testing.assert_array_equal(drawn[-1].cache.length_B, kept_B)
        return answers

    both = answers(prompts, temperature=5.0)
    assert [len(answer) for answer in both] == [8, 8]
    assert answers(prompts[:1], temperature=5.0, tokens_a_call=3) == both[:1]
    assert answers(prompts, temperature=5.0, tokens_a_call=0) == both
    assert answers(prompts[:1], temperature=5.0, tokens_a_call=3, seed=1) != both[:1]
    stop = both[0][1:3]
    cut = answers(prompts, temperature=5.0, stop=(tuple(stop),), tokens_a_call=3)
    assert cut[0] == both[0][: both[0].index(stop) + 2]
    assert cut[1] == (
        both[1][: both[1].index(stop) + 2] if stop in both[1] else both[1]
    )


def test_passages_are_those_that_were_read(tmp_path, ask):
    """Attention sums to one a token with what the window and the sinks got; chains climb to earlier bookmarks."""
    page = tmp_path / "page.html"
    ask("<What>?", page=page)
    assert "&lt;What&gt;?" in page.read_text() and "<q>" in page.read_text()

    params = cases.parameters(MODEL)
    token_BT = np.frombuffer(BOOK, np.uint8).astype(np.int32)[None]
    cache = caches.empty(MODEL, ROOM, 1)
    _, cache = step.prefill(params, token_BT[:, :-1], cache, MODEL)
    _, readings, cache = step.decode_step(
        params, jnp.asarray(token_BT[:, -1]), cache, MODEL, weigh=True
    )
    np.testing.assert_allclose(readings[0].mass_BGJ.sum(-1), 1, rtol=1e-5)
    decode = vocabulary.BYTES.decode
    found = explain.passages([readings], cache, token_BT[0], MODEL, decode, most=99)
    assert found and all(0 < p.mass < 1 and p.readers == 1 for p in found)
    read = np.unique(readings[0].block_id_BGJ[readings[0].block_id_BGJ >= 0])
    assert {p.first // 4 for p in found} <= set(read.tolist())
    assert set(np.unique(readings[0].choice_BGA)) <= {p.first // 4 for p in found}
    for passage in found:
        assert passage.text.encode() in b" ".join(BOOK.split())
        assert passage.chain[0].startswith("chapter of tokens")
        named = [int(s.split(":")[0].split()[-1]) for s in passage.chain[1:]]
        assert named == sorted(named, reverse=True) and named[0] == passage.first // 4
