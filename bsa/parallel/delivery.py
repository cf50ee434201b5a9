"""Blocks of keys to the devices that ask for them, and gradients back to those that own them. Called by `exchange`.

`asked`, int32[B, G, devices, capacity], says which of this device's blocks each device along "context" asks for, the
number of its blocks for none. Only devices before one have anything for it, and all send as much as there is room for.
"""

import jax
import jax.numpy as jnp
from jax import lax


def answers(key_BSGK, asked, key_block: int):
    """Blocks for the devices 1, 2, .. after this one, each [B, capacity, tokens of a block, G, K]."""

    def take(blocks_NCK, id):
        return blocks_NCK.at[id].get(mode="clip")

    take_heads = jax.vmap(jax.vmap(take, in_axes=(2, 0), out_axes=2))
    cut = _cut(key_BSGK, key_block)
    return [take_heads(cut, _asked_by(asked, i)) for i in range(1, asked.shape[2])]


def send(answers):
    """What arrives from the devices 1, 2, .. before this one."""
    arrived = []
    for shift, answer in enumerate(answers, start=1):
        pairs = [(i, i + shift) for i in range(len(answers) + 1 - shift)]
        arrived.append(lax.ppermute(answer, "context", pairs))
    return arrived


def join(arrived, own_BSGK):
    """What arrived, then own keys, which lie there before: without a barrier, XLA would copy everything at the end."""
    arrived = [x.reshape(len(x), -1, *x.shape[3:]) for x in arrived]
    size = arrived[0].shape[1]
    room = (0, 0), (size * len(arrived), 0), (0, 0), (0, 0)
    key_BSGK, arrived = lax.optimization_barrier((jnp.pad(own_BSGK, room), arrived))
    for i, x in enumerate(arrived):
        key_BSGK = lax.dynamic_update_slice_in_dim(key_BSGK, x, i * size, axis=1)
    return key_BSGK


def send_home(d_BSGK, asked, key_block: int):
    """Gradients of own keys, from those of what `join` gave on every device; float32."""
    devices, capacity = asked.shape[2:]
    begins = [i * capacity for i in range(1, devices)]
    *parts, own = jnp.split(_cut(d_BSGK, key_block), begins, axis=1)

    def add(total_NCK, id, part_NCK):
        return total_NCK.at[id].add(part_NCK.astype(jnp.float32), mode="drop")

    add_heads = jax.vmap(jax.vmap(add, in_axes=(2, 0, 2), out_axes=2))
    total = own.astype(jnp.float32)
    for shift, part in enumerate(parts, start=1):
        pairs = [(i + shift, i) for i in range(devices - shift)]
        answer = lax.ppermute(part, "context", pairs)
        total = add_heads(total, _asked_by(asked, shift), answer)
    return total.reshape(len(total), -1, *total.shape[3:])


def _cut(key_BSGK, key_block):
    B, _, G, K = key_BSGK.shape
    return key_BSGK.reshape(B, -1, key_block, G, K)


def _asked_by(asked, shift):
    """int32[B, G, capacity]: what the device so many after this one asks for."""
    other = (lax.axis_index("context") + shift) % asked.shape[2]
    return lax.dynamic_index_in_dim(asked, other, 2, keepdims=False)
