"""Keys or values of one layer in blocks: all of a text, or its first blocks and a ring of the last. Called by `cache`, `attend`."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Room for N blocks. Block n of the text lies at `slot(n)`, or where `pages` says; once overwritten, nobody may read it.

    Attributes:
        value_BGNCK: the model's dtype, or int8.
        scale_BGNC: float32, what int8 values are multiplied with; None for others.
        sink_blocks: first blocks of the text, which the ring of the others leaves alone.
        dtype: of what is read.
    """

    value_BGNCK: jax.Array
    scale_BGNC: jax.Array | None
    sink_blocks: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    def slot(self, block_id):
        """Where a block lies."""
        ring = max(self.value_BGNCK.shape[-3] - self.sink_blocks, 1)
        past = block_id - self.sink_blocks
        return jnp.where(past < 0, block_id, self.sink_blocks + past % ring)


def empty(shape, dtype: str, store: str, sink_blocks: int) -> Blocks:
    """No block yet.

    Args:
        shape: (B, G, N, C, K).
        store: one of `settings.STORES`.
    """
    is_int8 = store == "int8"
    return Blocks(
        jnp.zeros(shape, jnp.int8 if is_int8 else dtype),
        jnp.zeros(shape[:-1], jnp.float32) if is_int8 else None,
        sink_blocks,
        dtype,
    )


def write(blocks: Blocks, x_BTGK, slot_BGT, place_BT) -> Blocks:
    """Puts tokens into the slots of their blocks; those whose slot is negative, nowhere."""
    sizes = shapes.check(
        value_BGNCK=blocks.value_BGNCK,
        x_BTGK=x_BTGK,
        slot_BGT=slot_BGT,
        place_BT=place_BT,
    )
    B, G, N, C = (sizes[letter] for letter in "BGNC")
    at = (
        jnp.arange(B)[:, None, None],
        jnp.arange(G)[:, None],
        jnp.where(slot_BGT < 0, N, slot_BGT),
        place_BT[:, None] % C,
    )

    def put(array, x_BTG):
        return array.at[at].set(x_BTG.swapaxes(1, 2), mode="drop")

    if blocks.scale_BGNC is None:
        return dataclasses.replace(blocks, value_BGNCK=put(blocks.value_BGNCK, x_BTGK))
    x_BTGK = x_BTGK.astype(jnp.float32)
    scale_BTG = jnp.abs(x_BTGK).max(-1) / 127
    level_BTGK = jnp.round(x_BTGK / jnp.maximum(scale_BTG, 1e-30)[..., None])
    return dataclasses.replace(
        blocks,
        value_BGNCK=put(blocks.value_BGNCK, level_BTGK.astype(jnp.int8)),
        scale_BGNC=put(blocks.scale_BGNC, scale_BTG),
    )


def read(blocks: Blocks, block_id):
    """Blocks of one row and head, [..., C, K] for ids of any shape; ids of no block give any block."""
    return take(blocks, blocks.slot(block_id))


def take(blocks: Blocks, slot):
    """What lies in slots of one row and head."""
    scale = blocks.scale_BGNC
    return _decode(
        blocks.value_BGNCK.at[slot].get(mode="clip"),
        None if scale is None else scale.at[slot].get(mode="clip"),
        blocks.dtype,
    )


def read_slots(blocks: Blocks, first, num: int):
    """`num` slots from the first on, of every row and head: x_BGNCK."""
    value, scale = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, num, axis=2),
        (blocks.value_BGNCK, blocks.scale_BGNC),
    )
    return _decode(value, scale, blocks.dtype)


def _decode(value, scale, dtype):
    """Stored values to floating ones."""
    if scale is None:
        return value
    return (value.astype(jnp.float32) * scale[..., None]).astype(dtype)
