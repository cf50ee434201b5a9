"""Synthetic tasks can be answered from their texts, and from nothing else; their streams are repeatable."""

import contextlib

import numpy as np
import pytest

from bsa.tasks import catalogue, example
from tests.bsa.tasks import readers

# Name, options, tokens of a text: small, but of every form.
CASES = [
    ("mqar", {}, 64),
    ("mqar", {"num_pairs": 16, "V": 64}, 64),
    ("mqar", {"num_pairs": 12, "hops": 3, "V": 64}, 64),
    ("joint_recall", {}, 64),
    ("joint_recall", {"num_contexts": 3, "num_keys": 7, "num_queries": 21}, 96),
    ("selective_copy", {}, 100),
    ("induction_hops", {}, 96),
    ("induction_hops", {"hops": 3, "letters": 5}, 96),
    ("passkey", {}, 64),
    ("niah_single_1", {}, 64),
    ("niah_single_2", {}, 64),
    ("niah_single_3", {}, 64),
    ("niah_multikey_1", {}, 128),
    ("niah_multikey_2", {}, 128),
    ("niah_multikey_3", {}, 128),
    ("niah_multivalue", {}, 160),
    ("niah_multiquery", {}, 160),
    ("niah_multivalue", {"num_keys": 3, "num_values": 2, "num_questions": 3}, 192),
    ("variable_tracking", {}, 128),
    ("variable_tracking", {"hops": 2, "num_chains": 5}, 256),
    ("hop_needles", {}, 128),
    ("hop_needles", {"hops": 4, "noise": 2}, 128),
    ("common_words", {"num_common": 3, "times_common": 9}, 160),
    ("frequent_words", {}, 512),
    ("listops", {}, 64),
]
each_case = pytest.mark.parametrize(
    "name, options, num_tokens", CASES, ids=lambda x: str(x)
)
NUM_EXAMPLES = 60


def draw(name, options, num_tokens, seed=0):
    task = catalogue.TASKS[name](**options)
    return task, task.draw(num_tokens, np.random.default_rng(seed))


def test_every_task_has_a_case():
    """But for the one that reads a real text, see `test_citations`."""
    assert {name for name, _, _ in CASES} == set(catalogue.TASKS) - {"setmm_recall"}


@each_case
def test_answers_follow_from_the_text_before_them(name, options, num_tokens):
    rng = np.random.default_rng(1)
    guessed, num_asked = 0, 0
    task = catalogue.TASKS[name](**options)
    drawn = example.draw_many(task, num_tokens, rng, NUM_EXAMPLES)
    assert len(np.unique(drawn.token_BT, axis=0)) == NUM_EXAMPLES
    for row in zip(*drawn):
        one = example.Example(*row)
        assert {x.shape for x in (one.token_T, one.target_T)} == {(num_tokens,)}
        assert one.token_T.dtype == one.target_T.dtype == np.int32
        assert 0 <= one.token_T.min() and one.token_T.max() < task.V
        said = one.target_T.copy()
        for number in range(1, one.answer_id_T.max() + 1):
            places = np.flatnonzero(one.answer_id_T == number)
            prompt = one.token_T[: places[0] + 1].tolist()
            answer, pool = readers.reader(name)(prompt, number, task)
            assert tuple(one.target_T[places].tolist()) == answer
            said[places] = pool[rng.integers(len(pool))]
        if len(pool) > 1:
            guessed += one.score(said) * one.answer_id_T.max()
            num_asked += one.answer_id_T.max()
    if not num_asked:
        assert task.chance(num_tokens) <= 1e-5, "the one value is no guess"
        return
    chance = task.chance(num_tokens)
    assert 0 < chance < 1
    error = 4 * (chance * (1 - chance) / num_asked) ** 0.5
    assert abs(guessed / num_asked - chance) < max(error, 3 / num_asked)


@each_case
def test_seed_decides_everything(name, options, num_tokens):
    _, one = draw(name, options, num_tokens)
    _, same = draw(name, options, num_tokens)
    _, other = draw(name, options, num_tokens, seed=1)
    assert (one.token_T == same.token_T).all() and (one.target_T == same.target_T).all()
    assert (one.token_T != other.token_T).any()


@each_case
def test_shortest_text(name, options, num_tokens):
    """Texts are possible from some length on, exactly as long as said; below it, the error is one clear line."""
    possible = []
    for length in range(1, num_tokens):
        try:
            _, one = draw(name, options, length)
        except ValueError as error:
            assert name.split("_")[0] in str(error) or "needles" in str(error)
            assert "\n" not in str(error) and not possible
        else:
            assert len(one.token_T) == length and one.answer_id_T.max() >= 1
            possible.append(length)
            if len(possible) == 9:
                return


def test_values_of_mqar_are_not_told_after_the_question():
    _, one = draw("mqar", {"num_pairs": 64}, 512)
    asked = np.flatnonzero(one.answer_id_T)
    assert len(asked) == 64
    following = one.token_T[(asked + 1)[asked < 511]]
    assert (following != one.target_T[asked[asked < 511]]).mean() > 0.9
    gaps = [
        np.flatnonzero(draw("mqar", {}, 256, seed)[1].answer_id_T) for seed in range(99)
    ]
    assert np.median(gaps) < 64, "short gaps are the likeliest"


def test_score_is_the_share_of_whole_answers():
    answer_id_T = np.array([0, 1, 1, 0, 2, 2, 3, 0])
    target_T = np.array([0, 5, 6, 0, 7, 8, 9, 0])
    one = example.from_targets(target_T * 0 + 1, target_T, answer_id_T)
    assert one.weight_T.tolist() == [0, 1, 1, 0, 1, 1, 1, 0]
    said = target_T + (answer_id_T == 0)
    assert one.score(said) == 1
    said[5] = 0
    assert one.score(said) == pytest.approx(2 / 3)
    hit_BT = np.stack([target_T == said, np.zeros(8, bool)])
    both = example.score(hit_BT, np.stack([answer_id_T, answer_id_T]))
    assert both == pytest.approx([2 / 3, 0])


MIX = [
    (catalogue.TASKS["mqar"](V=64), 16),
    (catalogue.TASKS["mqar"](V=64), 64),
    (catalogue.TASKS["joint_recall"](num_contexts=2, num_keys=3, num_queries=2), 32),
]


def take(num_batches, state=None):
    """Some batches, and the state after them."""
    batches = iter(catalogue.train_batches(MIX, B=4, T=64, seed=5))
    with contextlib.closing(batches):
        if state is not None:
            batches.set_state(state)
        return [next(batches) for _ in range(num_batches)], batches.get_state()


def test_batches_are_packed_and_repeatable():
    batches, _ = take(4)
    lengths = set()
    for batch in batches:
        assert {x.shape for x in batch.values()} == {(4, 64)}
        assert batch["weight_BT"].sum(1) == pytest.approx(1), "every row counts alike"
        for segment_id_T, position_T in zip(
            batch["segment_id_BT"], batch["position_BT"]
        ):
            _, counts = np.unique(segment_id_T, return_counts=True)
            assert len(set(counts)) == 1 and (np.diff(segment_id_T) >= 0).all()
            assert (position_T == np.arange(64) % counts[0]).all()
            lengths.add(int(counts[0]))
    assert lengths == {16, 32, 64}
    for batch, again in zip(batches, take(4)[0]):
        assert all((batch[name] == again[name]).all() for name in batch)


def test_stream_goes_on_from_its_state():
    whole, _ = take(5)
    _, state = take(2)
    rest, _ = take(3, state)
    for batch, again in zip(whole[2:], rest):
        assert all((batch[name] == again[name]).all() for name in batch)


def test_test_examples_are_their_own():
    task = MIX[1][0]
    batch, answer_id_BT = catalogue.test_batch(task, 64, range(4), seed=5, T=128)
    again, _ = catalogue.test_batch(task, 64, [2], seed=5, T=64)
    assert (again["token_BT"][0] == batch["token_BT"][1, :64]).all()
    is_asked_BT = batch["weight_BT"].reshape(4, 64) > 0
    assert ((answer_id_BT > 0) == is_asked_BT).all()
    seen = {row.tobytes() for train in take(4)[0] for row in train["token_BT"]}
    assert not seen & {row.tobytes() for row in batch["token_BT"].reshape(4, 64)}


def test_many_pairs_are_as_likely_as_each_other():
    """Keys and values drawn for many examples together are distinct within one, and every id comes as often as others."""
    task = catalogue.TASKS["mqar"](num_pairs=6, V=16)
    rng = np.random.default_rng(0)
    pair_BT = task.draw_many(24, rng, 2000).token_BT[:, :12]
    for first, ids in ((0, range(1, 8)), (1, range(8, 16))):
        told_BP = np.sort(pair_BT[:, first::2], axis=1)
        assert (np.diff(told_BP, axis=1) > 0).all()
        for place in (0, 5):
            _, counts = np.unique(pair_BT[:, first::2][:, place], return_counts=True)
            expected = 2000 / len(ids)
            assert len(counts) == len(ids)
            assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_examples_that_do_not_fill_rows_are_refused():
    with pytest.raises(ValueError, match="no multiple of num_tokens=64"):
        catalogue.train_batches(MIX, B=4, T=96, seed=0)
