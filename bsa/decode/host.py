"""Keys and values of a bookmark layer in the host's memory: only listed blocks come to the device. Called by `attend`.

One call a layer and step takes the new tokens to the host and brings the listed blocks back. Blocks are not part of the
cache's pytree; but as with the arrays there, a cache that went into a step is gone, since the step changes them.
"""

import functools

import jax
import numpy as np
from jax.experimental import io_callback


class HostBlocks:
    """Room for the blocks of one layer; memory is taken page by page as it is written.

    Attributes:
        k_BGNCK, v_BGNCK: NumPy arrays in the model's dtype.
    """

    def __init__(self, shape, dtype: str):
        """Args: shape (B, G, N, C, K)."""
        self.k_BGNCK, self.v_BGNCK = (
            np.zeros(shape, jax.numpy.dtype(dtype)) for _ in range(2)
        )

    @property
    def nbytes(self) -> int:
        """Of keys and values, if all were written."""
        return self.k_BGNCK.nbytes + self.v_BGNCK.nbytes

    def exchange(self, k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGQJ):
        """Puts tokens at their places, then reads blocks: k_BGQJCK and v_BGQJCK; for -1 any block.

        Traced. The places must come from the cache that the last step returned, so that steps keep their order.
        """
        N, C, K = self.k_BGNCK.shape[2:]
        shape = jax.ShapeDtypeStruct((*block_id_BGQJ.shape, C, K), self.k_BGNCK.dtype)
        return io_callback(
            functools.partial(_exchange, self),
            (shape, shape),
            *(k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGQJ.clip(0, N - 1)),
        )


def _exchange(blocks, k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGQJ):
    """On the host."""
    arrays = (k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGQJ)
    k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGQJ = map(np.asarray, arrays)
    B, G, _, C, _ = blocks.k_BGNCK.shape
    row, token = np.nonzero(is_real_BT)
    block_id, offset = np.divmod(place_BT[row, token], C)
    row_B111 = np.arange(B)[:, None, None, None]
    group_G11 = np.arange(G)[:, None, None]
    found = []
    for kept, new in ((blocks.k_BGNCK, k_BTGK), (blocks.v_BGNCK, v_BTGK)):
        kept[row, :, block_id, offset] = new[row, token]
        found.append(kept[row_B111, group_G11, block_id_BGQJ])
    return tuple(found)
