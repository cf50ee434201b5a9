"""Rows grow from stage to stage, and a resumed run reads what it would have read."""

import json

import numpy as np
import pytest

from bsa.tasks import curriculum


@pytest.fixture
def make_batches(open_documents, random_documents, make_settings):
    corpus = open_documents(random_documents)
    settings = make_settings(B=1, T=128, curriculum=((3, 4, 32), (2, 2, 64)))
    return lambda: curriculum.Batches(corpus, settings)


def test_stages_follow_each_other_and_resume(make_batches):
    batches = make_batches()
    run, states = [], []
    for _ in range(8):
        states.append(json.loads(json.dumps(batches.get_state())))
        run.append(next(batches))
    batches.close()
    assert [batch["token_BT"].shape for batch in run] == (
        [(4, 32)] * 3 + [(2, 64)] * 2 + [(1, 128)] * 3
    )
    for first in (0, 2, 3, 5, 6):
        resumed = make_batches()
        resumed.set_state(states[first])
        for expected in run[first:]:
            for name, array in next(resumed).items():
                np.testing.assert_array_equal(array, expected[name])
        resumed.close()


def test_a_stage_that_cannot_be_is_refused(make_settings):
    with pytest.raises(ValueError, match=r"each stage is \(steps, B, T\)"):
        make_settings(curriculum=((3, 4),))
