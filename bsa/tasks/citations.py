"""Labels that Metamath proofs cite, asked for where they were mentioned before: recall in a real text, by distance.

A proof reads `label $p statement $= ( cited cited cited ) $.`; the text is `setmm` of `debian`, or another folder's. Only
held-out text is asked for, so this is for tests of models that were trained on the rest, not for training.
"""

import dataclasses
import functools
import pathlib
import re
import sys

import numpy as np

from bsa.tasks import debian, example, split

# The label of a statement, one that a comment points to, or all that a proof cites.
_MENTIONS = re.compile(
    rb"(?<!\S)(?:([\w.-]+)\s+\$[aefp]|~\s+([\w.-]+)|\$=\s*\(([^)]*)\))(?=\s)"
)
_LABEL = re.compile(rb"\S+")
_CITED = 3  # the group of the citations

_TRIES = 100
_CHANCE_DRAWS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text and where it mentions labels, in its own order; all places are bytes of the text.

    Attributes:
        text_S: uint8.
        names: of the parts that it is joined of; which are held out hangs on them.
        ends: int64, where each part ends.
        start, stop: int64, of each mention: a label where it is stated, cited, or pointed to by a comment (`~ label`).
        label_id: int64, of each mention, counted by first mentions.
        last: int64, start of the last mention of the same label before; -1 for its first one.
        cited: bool, whether a proof cites it there and goes on in the same line. What ends a line is not asked: no
            label tells whether a space or a line's end follows it.
    """

    text_S: np.ndarray
    names: tuple[str, ...]
    ends: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    label_id: np.ndarray
    last: np.ndarray
    cited: np.ndarray


@functools.cache
def read(folder: pathlib.Path) -> Document:
    """The files of a folder, joined in the order of their names; once a process (set.mm: two seconds)."""
    parts = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    text = b"".join(part for _, part in parts)
    ids, label_id, start, stop, cited = {}, [], [], [], []
    for found in _MENTIONS.finditer(text):
        for label in _LABEL.finditer(text, *found.span(found.lastindex)):
            label_id.append(ids.setdefault(label[0], len(ids)))
            start.append(label.start())
            stop.append(label.end())
            cited.append(found.lastindex == _CITED)
    text_S = np.frombuffer(text, np.uint8)
    start, stop, label_id = (np.array(x, int) for x in (start, stop, label_id))
    # Mentions label by label, each label's in the order of the text.
    order = np.argsort(label_id, kind="stable")
    is_same = np.diff(label_id[order]) == 0
    last = np.full(len(start), -1)
    last[order[1:][is_same]] = start[order[:-1][is_same]]
    return Document(
        text_S=text_S,
        names=tuple(name for name, _ in parts),
        ends=np.cumsum([len(part) for _, part in parts]),
        start=start,
        stop=stop,
        label_id=label_id,
        last=last,
        cited=np.array(cited, bool) & (text_S[stop] == ord(" ")),
    )


@dataclasses.dataclass(frozen=True)
class Citations:
    """A window of the text that ends in a held-out part, and asks for what is cited there and was mentioned before.

    Every citation in that part whose label was mentioned before in the window is asked for, if the last mention lies in
    the range. An answer is the label's bytes and the space after it, each predicted from the right bytes before it. Half
    of the answers are labels that training mentions hundreds of times: who has them by heart can guess without recall.

    Attributes:
        first_distance, last_distance: tokens (bytes) from the start of the last mention to that of the citation; the
            first is in the range, the last is not.
        trained_below: only labels that the training parts, before and after, mention fewer times than this.
        heldout_percent: as the configs' `data.heldout_percent`.
        folder: whose files are the document; None: `debian.folder("setmm")`.
    """

    first_distance: int = 0
    last_distance: int = sys.maxsize
    trained_below: int = sys.maxsize
    heldout_percent: int = 5
    folder: pathlib.Path | None = None
    V: int = 256

    def __post_init__(self):
        if not 0 <= self.first_distance < self.last_distance:
            raise ValueError(
                f"setmm_recall: first_distance={self.first_distance} must lie between 0 and"
                f" last_distance={self.last_distance}"
            )

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        document = self._document()
        first, asked = _window(self, document, num_tokens, rng)
        # One answer more where it starts, less where it stops.
        change_S = np.zeros(num_tokens + 2, int)
        number = np.arange(1, len(asked) + 1)
        change_S[document.start[asked] - first] += number
        change_S[document.stop[asked] + 1 - first] -= number
        text_S = document.text_S[first : first + num_tokens + 1]
        return example.from_text(text_S, np.cumsum(change_S)[:-1])

    def chance(self, num_tokens: int) -> float:
        """Of a guess among all labels that the window has mentioned by then, each as likely; the mean of 32 draws."""
        return _chance(self, self._document(), num_tokens)

    def _document(self):
        return read(self.folder or debian.folder("setmm"))


@functools.cache
def _sides(document, heldout_percent):
    """First bytes of the held-out parts, their ends, and how often training mentions each mention's label."""
    held = np.array([split.heldout(name, heldout_percent) for name in document.names])
    part_start = np.concatenate([[0], document.ends[:-1]])
    is_held = held[np.searchsorted(document.ends, document.start, side="right")]
    label_id = document.label_id
    trained = np.bincount(label_id[~is_held], minlength=len(label_id))[label_id]
    return part_start[held], document.ends[held], trained


def _window(task, document, num_tokens, rng):
    """A window's first byte, and the numbers of the mentions that it asks for."""
    part_start, part_end, trained = _sides(document, task.heldout_percent)
    # A window ends behind its last byte, which lies in the part.
    earliest = np.maximum(part_start, num_tokens) + 1
    num_windows = np.cumsum(np.maximum(part_end + 1 - earliest, 0))
    for _ in range(_TRIES if num_windows.any() else 0):
        number = rng.integers(num_windows[-1])
        part = np.searchsorted(num_windows, number, side="right")
        end = part_end[part] - (num_windows[part] - 1 - number)
        first = end - num_tokens - 1
        edges = max(first, part_start[part]), end
        inside = slice(*np.searchsorted(document.start, edges))
        last = document.last[inside]
        distance = document.start[inside] - last
        asked = document.cited[inside] & (document.stop[inside] < end)
        asked &= (last >= first) & (distance >= task.first_distance)
        asked &= distance < task.last_distance
        asked &= trained[inside] < task.trained_below
        if asked.any():
            return first, inside.start + np.flatnonzero(asked)
    raise ValueError(
        f"setmm_recall: num_tokens={num_tokens}: no window that ends in a held-out part of these"
        f" {len(document.text_S)} bytes cites what it mentioned {task.first_distance} to {task.last_distance} tokens"
        f" before, and training fewer than {task.trained_below} times ({_TRIES} tries)"
    )


@functools.cache
def _chance(task, document, num_tokens):
    expected = []
    for seed in range(_CHANCE_DRAWS):
        rng = np.random.default_rng(seed)
        first, asked = _window(task, document, num_tokens, rng)
        begin = np.searchsorted(document.start, first)
        is_new = document.last[begin : asked[-1] + 1] < first
        expected.append(np.mean(1 / np.cumsum(is_new)[asked - begin]))
    return float(np.mean(expected))
