"""Citations are asked for where a reader of the window could recall them, by distance, and in held-out text only."""

import collections
import functools

import numpy as np
import pytest

from bsa.tasks import catalogue, citations, sources, split
from configs import base
from tests.bsa.tasks import metamath

PART_BYTES = 4000
RANGES = [(0, 300), (300, 2000), (2000, 10**9)]
each_range = pytest.mark.parametrize("distances", [(0, 10**9), (46, 47), *RANGES])
each_length = pytest.mark.parametrize("num_tokens", [1000, 5000, 50_000])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder, and the text in it."""
    folder = tmp_path_factory.mktemp("cache") / "texts" / "setmm"
    return folder, metamath.write(folder, PART_BYTES)


@pytest.fixture
def make(written):
    return functools.partial(catalogue.TASKS["setmm_recall"], folder=written[0])


def draw(task, num_tokens, seed=0):
    return task.draw(num_tokens, np.random.default_rng(seed))


def answers(one):
    """(first target's place, bytes) of each answer, in order."""
    found = []
    for number in range(1, one.answer_id_T.max() + 1):
        places = np.flatnonzero(one.answer_id_T == number)
        assert (np.diff(places) == 1).all()
        found.append((int(places[0]), bytes(one.target_T[places].astype(np.uint8))))
    return found


def window(one, text):
    """Where it starts in the text."""
    return text.index(bytes(one.token_T.astype(np.uint8)))


@functools.cache
def mentions(text):
    return metamath.mentions(text)


def recallable(text, first, end, distances, below=10**9):
    """What `answers` should find in a window, by loops over the whole text's words."""
    held = [int(name[-2:]) for name in metamath.HELD_OUT]
    (held_start,) = (n * PART_BYTES for n in held if n == (end - 1) // PART_BYTES)
    trained = collections.Counter(
        label for start, label, _ in mentions(text) if start // PART_BYTES not in held
    )
    last, found = {}, []
    for start, label, cited in mentions(text):
        stop = start + len(label) + 1
        if start < first or stop > end:
            continue
        distance = start - last.get(label, start + 1)  # -1: none
        if (
            cited
            and text[start:stop] == label + b" "
            and start >= held_start
            and trained[label] < below
            and distances[0] <= distance < distances[1]
        ):
            found.append((start - 1 - first, text[start:stop]))
        last[label] = start
    return found


@each_range
@each_length
def test_what_is_asked(make, written, num_tokens, distances):
    """All citations of the held-out part, and no others, whose label was last mentioned in the range."""
    task, num_asked = make(*distances), 0
    if distances[0] >= num_tokens:
        with pytest.raises(
            ValueError, match=f"num_tokens={num_tokens}.*{distances[0]}"
        ):
            draw(task, num_tokens)
        return
    for seed in range(20):
        one = draw(task, num_tokens, seed)
        assert one.token_T.shape == one.target_T.shape == (num_tokens,)
        first = window(one, written[1])
        end = first + num_tokens + 1
        expected = recallable(written[1], first, end, distances)
        assert answers(one) == expected and expected
        num_asked += len(expected)
    assert num_asked >= 20


@pytest.mark.parametrize("below", [1, 3])
def test_labels_that_training_tells_can_be_left_out(make, written, below):
    num_asked = num_left_out = 0
    for seed in range(20):
        one = draw(make(0, 10**9, below), 5000, seed)
        first = window(one, written[1])
        place = first, first + 5001, (0, 10**9)
        expected = recallable(written[1], *place, below)
        assert answers(one) == expected
        num_asked += len(expected)
        num_left_out += len(recallable(written[1], *place)) - len(expected)
    assert num_asked >= 20 and num_left_out > 20


def test_ranges_share_out_what_is_asked(make):
    whole = draw(make(), 50_000)
    parts = [draw(make(*distances), 50_000) for distances in RANGES]
    assert all((part.token_T == whole.token_T).all() for part in parts)
    asked = [(part.answer_id_T > 0).astype(int) for part in parts]
    assert (sum(asked) == (whole.answer_id_T > 0)).all()
    num = [part.answer_id_T.max() for part in parts]
    assert min(num) > 0 and sum(num) == whole.answer_id_T.max()


def test_score_is_the_share_of_whole_labels(make):
    one = draw(make(), 5000)
    assert one.score(one.target_T) == 1
    said = one.target_T.copy()
    said[np.flatnonzero(one.answer_id_T == 2)[-1]] = ord("\n")
    assert one.score(said) == pytest.approx(1 - 1 / one.answer_id_T.max())


def test_seed_decides_everything(make):
    one, same, other = (draw(make(), 1000, seed) for seed in (0, 0, 1))
    assert (one.token_T == same.token_T).all() and (one.target_T == same.target_T).all()
    assert (one.token_T != other.token_T).any()


def test_chance_is_a_guess_among_the_labels_so_far(make, written):
    expected = []
    for seed in range(100, 200):
        one = draw(make(), 5000, seed)
        first = window(one, written[1])
        found = [(at - first, label) for at, label, _ in mentions(written[1])]
        pools = [
            len({label for at, label in found if 0 <= at <= place})
            for place, _ in answers(one)
        ]
        expected.append(np.mean(1 / np.array(pools)))
    chance = make().chance(5000)
    assert chance == pytest.approx(np.mean(expected), rel=0.2)
    assert make().chance(5000) == chance > make().chance(50_000) > 0


def test_what_has_no_room_says_so(make):
    for task, num_tokens in (
        (make(), 21 * PART_BYTES),  # no part to end in is so far back
        (make(first_distance=900), 900),
        (make(heldout_percent=0), 1000),
    ):
        with pytest.raises(ValueError, match=f"setmm_recall: num_tokens={num_tokens}"):
            draw(task, num_tokens)
    with pytest.raises(ValueError, match="first_distance=9 .*last_distance=9"):
        make(9, 9)


def test_held_out_is_what_training_holds_out(monkeypatch, written, make_settings):
    folder, text = written
    monkeypatch.setenv("BSA_CACHE", str(folder.parents[1]))
    percent = base.get_config().data.heldout_percent
    settings = make_settings(source="setmm", heldout_percent=percent)
    corpus = sources.open_corpus(settings)
    _, heldout_ids = split.split(corpus, percent)
    task = citations.Citations()
    assert task.heldout_percent == percent
    assert [corpus.names[i] for i in heldout_ids] == [*metamath.HELD_OUT]
    document = citations.read(folder)
    assert document.names == corpus.names and document.text_S.tobytes() == text
    named = draw(citations.Citations(folder=folder), 1000)
    assert (draw(task, 1000).token_T == named.token_T).all()
