"""A resumed iterator gives the identical next batches."""

import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bsa.tasks import pipeline


@pytest.fixture
def batches(open_documents, random_documents, make_settings):
    """Rows from several rounds of packing, text and passkeys, over several epochs."""
    corpus = open_documents(random_documents)
    settings = make_settings(passkey_share=0.2, T=128, B=4, packing_bins=6)
    return lambda: iter(pipeline.train_batches(corpus, settings))


def assert_same(batches_a, batches_b):
    for a, b in zip(batches_a, batches_b, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_same_seed_same_batches(batches):
    assert_same(itertools.islice(batches(), 60), itertools.islice(batches(), 60))


def test_state_names_the_next_batch(batches):
    run = list(itertools.islice(batches(), 60))
    iterator = batches()
    for step in range(50):
        state = json.dumps(iterator.get_state())
        if step in (0, 1, 2, 3, 7, 20, 49):
            resumed = batches()
            resumed.set_state(json.loads(state))
            assert_same(itertools.islice(resumed, 10), run[step : step + 10])
            resumed.set_state(json.loads(state))
            assert_same(itertools.islice(resumed, 3), run[step : step + 3])
            resumed.close()
        next(iterator)
    iterator.close()


def test_orbax_restores_the_next_batch(batches, tmp_path):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
    run = list(itertools.islice(batches(), 20))
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        iterator = batches()
        for step in range(1, 14):
            next(iterator)
            if step in (1, 5, 13):
                data = grain.checkpoint.CheckpointSave(iterator)
                manager.save(step, args=ocp.args.Composite(data=data))
        iterator.close()
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        for step in (1, 5, 13):
            resumed = batches()
            data = grain.checkpoint.CheckpointRestore(resumed)
            manager.restore(step, args=ocp.args.Composite(data=data))
            assert_same(itertools.islice(resumed, 5), run[step : step + 5])
            resumed.close()
