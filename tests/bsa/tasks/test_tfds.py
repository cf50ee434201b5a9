"""A prepared TFDS data set is a corpus, without TensorFlow."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from bsa.tasks import sources


class SmallStories(tfds.core.GeneratorBasedBuilder):
    """Thirty short texts, one of them empty, and some numbers."""

    # TFDS 4.9.10 finds the code of a dotted module, such as pytest's name of this one,
    # through importlib_resources, which it does not install.
    __module__ = "small_stories"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(30),
            "test": self._generate_examples(4),
        }

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"story {i} is över. " * i, "id": i}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    SmallStories(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_documents_are_the_examples(tfds_dir, make_settings):
    expected = {f"story {i} is över. ".encode() * i for i in range(1, 30)}
    for source in ("tfds:small_stories", "tfds:small_stories:1.0.0:train"):
        settings = make_settings(source=source, tfds_dir=str(tfds_dir))
        corpus = sources.open_corpus(settings)
        texts = {corpus.read(i, 0, int(n)) for i, n in enumerate(corpus.sizes)}
        assert texts == expected
        assert len(corpus.names) == 29
        assert all(name.startswith("small_stories/train/") for name in corpus.names)
    settings = make_settings(source="tfds:small_stories:test", tfds_dir=str(tfds_dir))
    corpus = sources.open_corpus(settings)
    assert len(corpus.names) == 3
    where = int(corpus.sizes.argmax())
    assert corpus.read(where, 8, 13) == "is ö".encode()


def test_training_batches_need_no_tensorflow(tfds_dir, make_settings):
    settings = make_settings(
        source="tfds:small_stories", tfds_dir=str(tfds_dir), heldout_percent=20
    )
    program = f"""
import sys
from bsa.tasks import pipeline, sources
from bsa.tasks.settings import DataSettings
settings = {settings!r}
iterator = iter(pipeline.train_batches(sources.open_corpus(settings), settings))
batch = [next(iterator) for _ in range(3)][-1]
iterator.close()
assert batch["weight_BT"].mean() > 0.5
assert bytes(batch["token_BT"][0].tolist()).count(b"story") > 1
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_errors_are_one_line_that_says_what_would_work(tfds_dir, make_settings):
    def message(source, error, **changes):
        changes = {"tfds_dir": str(tfds_dir)} | changes
        with pytest.raises(error) as caught:
            sources.open_corpus(make_settings(source=source, **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    command = "`tfds build nothing --file_format=array_record"
    assert command in message("tfds:nothing", FileNotFoundError)
    assert "train, test" in message("tfds:small_stories:dev", ValueError)
    assert "slice" in message("tfds:small_stories:train[:50%]", ValueError)
    line = message("tfds:small_stories", ValueError, tfds_feature="body")
    assert "id, text" in line or "text, id" in line
    line = message("tfds:small_stories", ValueError, tfds_feature="id")
    assert "not text" in line


def test_tfrecord_is_refused_with_the_command_that_helps(
    tfds_dir, make_settings, tmp_path
):
    """The format stands in dataset_info.json; writing real tfrecord takes TensorFlow."""
    prepared = tfds_dir / "small_stories/1.0.0"
    copy = tmp_path / "small_stories/1.0.0"
    copy.mkdir(parents=True)
    for file in prepared.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    info = json.loads((copy / "dataset_info.json").read_text())
    text = json.dumps(info).replace("array_record", "tfrecord")
    (copy / "dataset_info.json").write_text(text)
    settings = make_settings(source="tfds:small_stories", tfds_dir=str(tmp_path))
    with pytest.raises(ValueError, match="prepared as tfrecord.*--file_format=array"):
        sources.open_corpus(settings)
