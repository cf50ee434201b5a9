"""A prepared TFDS data set as a corpus, without TensorFlow; only `sources` calls this.

Decoding array_record needs no TensorFlow; decoding tfrecord, the default of
`tfds build`, does, and has no random access.
"""

import re

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from bsa.tasks import corpus as corpus_lib

_SPEC = re.compile(
    r"(?P<name>[\w./-]+)(?P<version>:\d[\d.]*)?(:(?P<split>[A-Za-z_]\w*))?"
)


def open_tfds(spec: str, *, data_dir: str, feature: str) -> corpus_lib.Corpus:
    """Opens one split of a data set that lies prepared as array_record.

    Sizes are not part of the format, so every example is read once, here. Documents are
    named NAME/SPLIT/NUMBER; slices of splits are refused, as they would renumber.

    Args:
        spec: NAME[/CONFIG][:VERSION][:SPLIT]; the split is `train` unless said otherwise.
        data_dir: where data sets are prepared; "" is TFDS's own default.
        feature: which feature is the text: a string or bytes.
    Raises:
        FileNotFoundError: no such data set is prepared there.
        ValueError: the spec cannot be read, the split or feature does not exist, or the
            file format has no random access.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(
            f"data: source=tfds:{spec} cannot be read; it is tfds:NAME[/CONFIG][:VERSION]"
            "[:SPLIT], and a split stands without a slice"
        )
    name, split = match["name"], match["split"] or "train"
    builder = _open_builder(name, match["version"] or "", data_dir)
    if split not in builder.info.splits:
        raise ValueError(
            f"data: tfds:{name} has no split {split!r}; it has"
            f" {', '.join(builder.info.splits)}: write tfds:{name}:SPLIT"
        )
    if feature not in builder.info.features:
        raise ValueError(
            f"data: tfds:{name} has no feature {feature!r}; set data.tfds_feature to one"
            f" of {', '.join(builder.info.features)}"
        )
    examples = builder.as_data_source(split=split)
    if len(examples) and not isinstance(examples[0][feature], (bytes, str)):
        raise ValueError(
            f"data: feature {feature!r} of tfds:{name} is"
            f" {type(examples[0][feature]).__name__}, not text; set data.tfds_feature"
        )

    def text(number: int) -> bytes:
        value = examples[number][feature]
        return value.encode() if isinstance(value, str) else value

    sizes = np.array([len(text(number)) for number in range(len(examples))], np.int64)
    numbers = np.flatnonzero(sizes)
    return corpus_lib.Corpus(
        names=tuple(f"{name}/{split}/{number}" for number in numbers),
        sizes=sizes[numbers],
        read=lambda document_id, start, stop: text(numbers[document_id])[start:stop],
    )


def _open_builder(name: str, version: str, data_dir: str):
    """Opens from files alone: the data set's own code may import TensorFlow."""
    where = f" --data_dir={data_dir}" if data_dir else ""
    command = (
        f"`tfds build {name} --file_format=array_record{where}` (which needs TensorFlow,"
        " unlike reading)"
    )
    try:
        builder = read_only_builder.builder_from_files(
            name + version, data_dir=data_dir or None
        )
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data: tfds:{name}{version} is not prepared in"
            f" {data_dir or '~/tensorflow_datasets'}; prepare it with {command}"
        ) from error
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise ValueError(
            f"data: tfds:{name} is prepared as {file_format}, which has no random access;"
            f" prepare it with {command}"
        )
    return builder
