"""What an older version kept of a run is a run of today's, if its knobs were only added to."""

import json

import ml_collections
import pytest

from bsa.train import settings
from configs import base


def test_knobs_that_came_later_leave_everything_as_it_was():
    config = base.get_config()
    kept = json.loads(config.to_json())
    for name in ("granularity", "spans", "stride"):
        del kept["index"][name]
    del kept["model"]["ask_again"]
    completed = settings.complete(kept)
    assert completed == json.loads(config.to_json())
    kept["index"]["stride"] = 3
    assert settings.complete(kept)["index"]["stride"] == 3
    del kept["index"]["A"]
    with pytest.raises(ValueError, match="index: missing knob A"):
        settings.from_config(ml_collections.ConfigDict(settings.complete(kept)))
