"""Keys and values of a bookmark layer in the host's memory: only listed blocks come to the device. Called by `attend`.

One call a layer and step takes the new tokens to the host and brings blocks back: each once, however many lists name it,
and none of those that the token before has read, which stay on the device (`Near`). Blocks are not part of the cache's
pytree; but as with the arrays there, a cache that went into a step is gone, since the step changes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

GROWTH = 8
"""Arrays have one size: a call brings the least of 8, 64, 512, .. blocks a row and head that suffices."""


class Near(NamedTuple):
    """Blocks that the last token read, on the device.

    Attributes:
        block_id_BGJ: int32; -1 for none.
        k_BGJCK, v_BGJCK: as they were then.
    """

    block_id_BGJ: jax.Array
    k_BGJCK: jax.Array
    v_BGJCK: jax.Array


class HostBlocks:
    """Room for the blocks of one layer; memory is taken page by page as it is written.

    Attributes:
        k_BGNCK, v_BGNCK: NumPy arrays in the model's dtype.
    """

    def __init__(self, shape, dtype: str):
        """Args: shape (B, G, N, C, K)."""
        self.k_BGNCK, self.v_BGNCK = (
            np.zeros(shape, jnp.dtype(dtype)) for _ in range(2)
        )

    @property
    def nbytes(self) -> int:
        """Of keys and values, if all were written."""
        return self.k_BGNCK.nbytes + self.v_BGNCK.nbytes

    def near(self, num_blocks: int) -> Near:
        """Room for the blocks of a token's list, none of them there yet."""
        B, G, _, C, K = self.k_BGNCK.shape
        k, v = (
            jnp.zeros((B, G, num_blocks, C, K), self.k_BGNCK.dtype) for _ in range(2)
        )
        return Near(jnp.full((B, G, num_blocks), -1, jnp.int32), k, v)

    def exchange(self, new, block_id_BGQJ, near: Near):
        """Puts tokens at their places, then reads blocks.

        Traced. The places must come from the cache that the last step returned, so that steps keep their order.

        Args:
            new: k_BTGK, v_BTGK, place_BT and is_real_BT.
            block_id_BGQJ: no more in a list than `near` has room for.
        Returns:
            k_BGQJCK and v_BGQJCK, for -1 any block, and the next `near`.
        """
        place_BT, shape = new[2], block_id_BGQJ.shape
        N, C = self.k_BGNCK.shape[2:4]
        id_BGX = block_id_BGQJ.clip(0, N - 1).reshape(*shape[:2], -1)
        if place_BT.shape[1] > 1:
            k, v = (x.reshape(*shape, *x.shape[3:]) for x in self._bring(new, id_BGX))
            nothing = jnp.full_like(near.block_id_BGJ, -1)
            return k, v, near._replace(block_id_BGJ=nothing)

        more = near.block_id_BGJ.shape[2] - id_BGX.shape[2]
        id_BGJ = jnp.pad(id_BGX, [(0, 0), (0, 0), (0, more)], mode="edge")
        is_same = id_BGJ[..., None] == near.block_id_BGJ[:, :, None]
        # The new token's own block is not what it was.
        is_near = is_same.any(-1) & (id_BGJ != place_BT[:, None] // C)
        brought = self._bring(new, jnp.where(is_near, N, id_BGJ))
        k, v = (
            jnp.where(is_near[..., None, None], _take(kept, is_same.argmax(-1)), x)
            for kept, x in zip(near[1:], brought)
        )
        one = (x[:, :, None, : shape[3]] for x in (k, v))
        return *one, Near(id_BGJ, k, v)

    def _bring(self, new, id_BGX):
        """Puts tokens, and reads blocks below N, each once: k_BGXCK and v_BGXCK; at N any block."""
        N, C, K = self.k_BGNCK.shape[2:]
        *BG, X = id_BGX.shape
        unique = functools.partial(
            jnp.unique, size=X, fill_value=N, return_inverse=True
        )
        once_BGX, place_BGX = jax.vmap(jax.vmap(unique))(id_BGX)
        sizes = [GROWTH**power for power in range(1, 12) if GROWTH**power < X] + [X]

        def of_size(size, new, once_BGX, place_BGX):
            blocks = jax.ShapeDtypeStruct((*BG, size, C, K), self.k_BGNCK.dtype)
            brought = io_callback(
                functools.partial(move, self),
                (blocks, blocks),
                *(*new, once_BGX[..., :size].clip(0, N - 1)),
            )
            return tuple(_take(x, place_BGX.clip(0, size - 1)) for x in brought)

        needed = (once_BGX < N).sum(-1).max()
        branches = [functools.partial(of_size, size) for size in sizes]
        which = (needed > jnp.array(sizes[:-1], jnp.int32)).sum()
        return lax.switch(which, branches, new, once_BGX, place_BGX)


def _take(x_BGNCK, id_BGX):
    """x_BGXCK."""
    return jax.vmap(jax.vmap(lambda x, place: x[place]))(x_BGNCK, id_BGX)


def move(blocks, k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGX):
    """What `HostBlocks.exchange` has the host do."""
    arrays = (k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGX)
    k_BTGK, v_BTGK, place_BT, is_real_BT, block_id_BGX = map(np.asarray, arrays)
    B, G, _, C, _ = blocks.k_BGNCK.shape
    row, token = np.nonzero(is_real_BT)
    block_id, offset = np.divmod(place_BT[row, token], C)
    row_B11 = np.arange(B)[:, None, None]
    group_G1 = np.arange(G)[:, None]
    found = []
    for kept, new in ((blocks.k_BGNCK, k_BTGK), (blocks.v_BGNCK, v_BTGK)):
        kept[row, :, block_id, offset] = new[row, token]
        found.append(kept[row_B11, group_G1, block_id_BGX])
    return tuple(found)
