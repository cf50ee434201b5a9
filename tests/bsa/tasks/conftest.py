"""Small folders of text, and settings for them."""

import numpy as np
import pytest

from bsa.tasks import settings as settings_lib
from bsa.tasks import sources


@pytest.fixture
def make_settings():
    def make(**changes):
        values = {
            "source": "stdlib",
            "tfds_dir": "",
            "tfds_feature": "text",
            "heldout_percent": 50,
            "B": 2,
            "T": 64,
            "curriculum": (),
            "cross_document": False,
            "packing_bins": 4,
            "passkey_share": 0.0,
            "passkey_min_tokens": 112,
            "seed": 3,
            "prefetch_batches": 2,
        }
        return settings_lib.DataSettings(**(values | changes))

    return make


@pytest.fixture
def random_documents():
    """Name -> bytes: 60 documents of 0 to 500 random bytes, around multiples of 64."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 2, 3, 64, 65, 66, 128, 129, 130, *rng.integers(1, 500, 50)]
    return {f"part{i % 3}/{i:02}.txt": rng.bytes(size) for i, size in enumerate(sizes)}


@pytest.fixture
def open_documents(tmp_path, make_settings):
    """Writes documents as files and opens them with `files:GLOB`."""

    def open_them(documents):
        for name, text in documents.items():
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        return sources.open_corpus(
            make_settings(source=f"files:{tmp_path}/texts/**/*.txt")
        )

    return open_them
