"""Decoding on long caches, for `bench_kernels`: lists in pieces against all of the cache.

A step's output is the next step's query, so a chain of steps on the device measures latency
without the host's; unrolled, for a loop launches a counter and a copy of the query each step.
The copy rate that bytes are held against is measured beside.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from pallas_kernels import BlockSelection, mosaic_gpu_decode

H, G, K, KEY_BLOCK = 16, 4, 128, 16
STEPS = 20
REPEATS = 20
COPIED_BYTES = 2**30


def _attend_densely(q_BTHK, k_BSGK, v_BSGK, position_B):
    """Attention over the whole cache by XLA: the dense peer."""
    B, T, _, _ = q_BTHK.shape
    q_BTGHK = q_BTHK.reshape(B, T, G, H // G, K)
    s_BGHTS = jnp.einsum(
        "BTGHK,BSGK->BGHTS", q_BTGHK, k_BSGK, preferred_element_type=jnp.float32
    )
    may_read_BS = jnp.arange(k_BSGK.shape[1]) <= position_B[:, None]
    s_BGHTS = jnp.where(may_read_BS[:, None, None, None], s_BGHTS * K**-0.5, -jnp.inf)
    p_BGHTS = jax.nn.softmax(s_BGHTS, axis=-1).astype(q_BTHK.dtype)
    out_BTGHK = jnp.einsum("BGHTS,BSGK->BTGHK", p_BGHTS, v_BSGK)
    return out_BTGHK.reshape(q_BTHK.shape)


def _median_ms(function, *arguments):
    """Of calls that have compiled."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _draw_lists(batch, length, entries):
    """One list a sequence and head: an ascending block from each of equal stretches."""
    stretch = length // KEY_BLOCK // entries
    draw = jax.random.randint(jax.random.key(2), (batch, G, 1, entries), 0, stretch)
    block_id = jnp.arange(entries, dtype=jnp.int32) * stretch + draw
    count = jnp.full((batch, G, 1), entries, jnp.int32)
    query_block = mosaic_gpu_decode.QUERY_BLOCK
    return BlockSelection(block_id, count, None, query_block, KEY_BLOCK)


def measure(batch, length, read_len=2560):
    """Yields the record of one batch size, of `length` tokens of cache."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, 1, H, K), jnp.bfloat16)
    cache = [
        jax.random.normal(key, (batch, length, G, K), jnp.bfloat16) for key in keys[1:]
    ]
    position_B = jnp.full(batch, length - 1, jnp.int32)
    selection = _draw_lists(batch, length, read_len // KEY_BLOCK)

    def attend(q, k, v, selection, position_B):
        return mosaic_gpu_decode.attend(q, k, v, selection, position_B, scale=K**-0.5)[
            0
        ]

    def attend_densely(q, k, v, selection, position_B):
        return _attend_densely(q, k, v, position_B)

    def repeat(step):
        @jax.jit
        def chain(q, *others):
            return jax.lax.fori_loop(
                0, STEPS, lambda _, q: step(q, *others), q, unroll=True
            )

        return chain

    x = jnp.zeros(COPIED_BYTES // 4, jnp.uint32)
    copied = 2 * COPIED_BYTES / _median_ms(jax.jit(lambda x: x + 1), x)
    arguments = (q, *cache, selection, position_B)
    ms = {
        name: _median_ms(repeat(step), *arguments) / STEPS
        for name, step in (("mosaic_gpu", attend), ("dense", attend_densely))
    }
    selected_bytes = 2 * 2 * batch * G * read_len * K
    yield {
        "part": "decode",
        "batch": batch,
        "length": length,
        "read_len": read_len,
        "ms": ms["mosaic_gpu"],
        "dense_ms": ms["dense"],
        "times_dense": ms["dense"] / ms["mosaic_gpu"],
        "selected_gb_s": selected_bytes / ms["mosaic_gpu"] / 1e6,
        "copy_gb_s": copied / 1e6,
        "of_copy": selected_bytes / ms["mosaic_gpu"] / copied,
    }
