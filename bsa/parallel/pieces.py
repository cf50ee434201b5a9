"""Functions of single tokens, a piece of each row at a time: memory that does not grow with the row.

Called by `bsa.model` and `bsa.train`.
"""

import jax
import jax.numpy as jnp

from bsa.parallel import mesh


def map_tokens(function, arrays, piece_tokens: int, placement: mesh.Placement):
    """Applies a function of single tokens to pieces of rows, one after another; backward recomputes what is inside.

    Where a row lies on many devices, each cuts its own part into pieces, and no token moves.

    Args:
        function: of as many arrays, [.., tokens, ..] with leading axes of its own choice (rows, or rows and devices);
            returns a tree of such arrays.
        arrays: tuple of arrays with axes BT and more.
        piece_tokens: of a row, on each device that holds part of it.
    Returns:
        What the function returns, for all tokens.
    """
    B, T = arrays[0].shape[:2]
    devices = placement.context
    piece = min(piece_tokens, T // devices)
    pad = -(T // devices) % piece

    def cut(x):
        """To [pieces, B, devices, piece, ..]; a device's part stays there."""
        x = x.reshape(B, devices, T // devices, *x.shape[2:])
        x = jnp.pad(x, [(0, pad if axis == 2 else 0) for axis in range(x.ndim)])
        x = x.reshape(B, devices, -1, piece, *x.shape[3:])
        return constrain(jnp.moveaxis(x, 2, 0), "1BT")

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(B, devices, T // devices + pad, *x.shape[4:])
        x = x[:, :, : T // devices].reshape(B, T, *x.shape[3:])
        return constrain(x, "BT")

    def constrain(x, axes):
        return placement.constrain(x, axes.ljust(x.ndim, "1"))

    if piece == T // devices:
        return jax.checkpoint(function)(*arrays)
    of_piece = jax.checkpoint(lambda pieces: function(*pieces))
    return jax.tree.map(join, jax.lax.map(of_piece, tuple(map(cut, arrays))))
