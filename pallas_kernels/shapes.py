"""The alphabet of axes: names end in capitals that say the shape, and `check` holds arrays to it.

Every package uses these letters; the same letters are the config's keys for sizes (`config.model.D`).
"""

ALPHABET = {
    "B": "batch",
    "T": "query tokens",
    "S": "key tokens",
    "D": "model width",
    "H": "query heads",
    "G": "key/value heads",
    "K": "head width",
    "F": "MLP width",
    "V": "vocabulary",
    "L": "layers",
    "C": "tokens per key block",
    "N": "key blocks",
    "Q": "query blocks",
    "J": "key blocks read per query block",
    "M": "bookmarks",
    "R": "points of a bookmark",
    "P": "links of a bookmark",
    "E": "chapters",
    "A": "blocks that one token chooses",
    "X": "blocks on one token's shortlist",
}


def check(**arrays) -> dict[str, int]:
    """Checks that arrays have the shapes their names promise; costs nothing at run time.

    Args:
        **arrays: `name_AXES=array`. The suffix after the last underscore names one axis a letter, outermost first;
            `1` is a broadcast axis. An array of None is skipped, so optional arguments need no branch.
    Returns:
        The size of every letter met.
    Raises:
        ValueError: a rank differs from its suffix, a letter has two sizes, or a letter is not in `ALPHABET`.
    """
    sizes, owner = {}, {}
    for name, array in arrays.items():
        if array is None:
            continue
        axes = name.rpartition("_")[2]
        if unknown := set(axes) - set(ALPHABET) - {"1"}:
            raise ValueError(
                f"{name}: no axis is called {''.join(sorted(unknown))}; the letters are in shapes.ALPHABET"
            )
        if len(axes) != array.ndim:
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}, but its name promises {len(axes)} axes"
            )
        for letter, size in zip(axes, array.shape):
            expected = 1 if letter == "1" else sizes.setdefault(letter, size)
            if size != expected:
                raise ValueError(
                    f"{name} has {letter}={size}, but {letter}={expected}"
                    + (f" in {owner[letter]}" if letter in owner else "")
                )
            owner.setdefault(letter, name)
    return sizes
