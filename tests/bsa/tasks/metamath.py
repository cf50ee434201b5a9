"""Writes a text of set.mm's form, and reads one word by word."""

import textwrap

import numpy as np

HELD_OUT = ("set.mm.13", "set.mm.20")
"""Of the parts' names, at 5%: those that their hashes hold out."""


def write(folder, part_bytes, num_parts=22):
    """Statements whose proofs cite earlier ones, most of them near, cut into parts wherever they end."""
    rng = np.random.default_rng(0)
    labels, text, size = [], [], 0
    while size < part_bytes * num_parts:
        label = f"{rng.choice(['syl', 'ax-', 'df.', 'n_'])}{len(labels)}"
        back = (len(labels) * rng.random(rng.integers(1, 20)) ** 6).astype(int)
        cited = list(dict.fromkeys(labels[-1 - i] for i in back)) if labels else []
        proof = textwrap.indent(textwrap.fill(" ".join(["(", *cited, ")"]), 40), "  ")
        near = f"$( See ~ {cited[0]} , not {cited[-1]} . $)\n" if cited else ""
        kind = rng.choice(["$p |- x", "$a |- x", "$e |- ph", "$f wff ph"])
        end = f" $=\n{proof} $.\n" if kind.startswith("$p") else " $.\n"
        text.append(f"{near}{label} {kind}{end}")
        labels.append(label)
        size += len(text[-1])
    whole = "".join(text).encode()
    folder.mkdir(parents=True)
    for number in range(num_parts):
        part = whole[number * part_bytes : (number + 1) * part_bytes]
        (folder / f"set.mm.{number:02}").write_bytes(part)
    return whole[: num_parts * part_bytes]


def mentions(text):
    """(start, label, whether it is cited there) of each mention in a text, in order."""
    at, words = 0, []
    for word in text.split():
        at = text.index(word, at)
        words.append((at, word))
        at += len(word)
    found, in_proof = [], False
    around = zip([(0, b"")] * 2 + words, [(0, b"")] + words, words, words[1:])
    for (_, before), (_, last), (at, word), (_, following) in around:
        in_proof = (before, last) == (b"$=", b"(") or (in_proof and last != b")")
        in_proof = in_proof and word != b")"
        stated = following in (b"$p", b"$a", b"$e", b"$f")
        if in_proof or stated or last == b"~":
            found.append((at, word, in_proof))
    return found
