"""NSA's selected attention, as flash-linear-attention has it, on the tensors and choices of ours, for `bench_kernels`.

64 query heads share 4 key/value heads; each token reads 16 key blocks of 64: the first, the two newest, and 13 of its
own choice (arXiv 2502.11089). How many different ones the 16 tokens of a query block choose decides what sharing their
reads costs: they choose from a pool of 13 (all alike), of 36, or of 208 (hardly any in common). FLOPs of both count the
pairs that tokens chose; what ours computes besides, and masks, costs it time.

The peer needs torch, triton and fla-core 0.6; only its operator on given blocks is called, without the compressed and
the sliding branch, and after it has tuned itself.
"""

import jax
import jax.numpy as jnp

from experiments import bench_cases, bench_timing
from pallas_kernels import BlockSelection

H, G, K = 64, 4, 128
QUERY_BLOCK, KEY_BLOCK = 16, 64
CHOSEN = 16
DRAWN = CHOSEN - 3
POOLS = (13, 36, 208)
LONGEST = 2**17
"""Tokens; with longer texts the arrays of both, and their gradients, fill the card."""


def draw(length, pool):
    """Choices of single tokens, and the same as lists with token masks.

    Args:
        pool: blocks from which the tokens of a query block choose.
    Returns:
        choice_BTGA: int32, -1 where there are fewer blocks before the token.
        `BlockSelection` with a row for each query block's union.
    """
    Q = length // QUERY_BLOCK
    pool_key, choice_key = jax.random.split(jax.random.key(1))
    own_Q1 = (jnp.arange(Q, dtype=jnp.int32) * QUERY_BLOCK // KEY_BLOCK)[:, None]
    edge = jnp.arange(pool + 1) * jnp.maximum(own_Q1 - 2, 0) // pool
    drawn = jax.random.randint(pool_key, (G, Q, pool), edge[:, :-1], edge[:, 1:])
    pool_id = jnp.where(edge[:, 1:] > edge[:, :-1], 1 + drawn, -1).astype(jnp.int32)

    wish = jax.random.uniform(choice_key, (G, Q, QUERY_BLOCK, pool))
    wish, place = jax.lax.top_k(jnp.where(pool_id[:, :, None] < 0, -1, wish), DRAWN)
    place = jnp.where(wish < 0, -1, place)
    chosen = (place[..., None] == jnp.arange(pool)).any(-2)
    bit = jnp.uint32(1) << jnp.arange(QUERY_BLOCK, dtype=jnp.uint32)[:, None]
    pool_mask = jnp.where(chosen, bit, 0).sum(-2, dtype=jnp.uint32)

    newest_Q2 = jnp.concatenate([own_Q1, own_Q1 - 1], axis=1)
    newest_Q2 = jnp.where(newest_Q2 > 0, newest_Q2, -1)
    fixed_Q3 = jnp.pad(newest_Q2, ((0, 0), (1, 0)))
    fixed = jnp.broadcast_to(fixed_Q3, (G, Q, 3))
    picked = jnp.take_along_axis(pool_id[:, :, None], jnp.maximum(place, 0), axis=-1)
    choice = jnp.concatenate(
        [
            jnp.broadcast_to(fixed[:, :, None], (G, Q, QUERY_BLOCK, 3)),
            jnp.where(place < 0, -1, picked),
        ],
        axis=-1,
    )
    choice_BTGA = choice.reshape(1, G, length, CHOSEN).swapaxes(1, 2)
    everyone = jnp.full_like(fixed, 2**QUERY_BLOCK - 1, jnp.uint32)
    return choice_BTGA, _list(
        jnp.concatenate([fixed, pool_id], axis=-1),
        jnp.concatenate([everyone, pool_mask], axis=-1),
    )


def _list(block_id, mask):
    """Lists without the blocks that nobody reads."""
    is_read = (block_id >= 0) & (mask > 0)
    order = jnp.argsort(~is_read, axis=-1, stable=True)
    block_id = jnp.take_along_axis(jnp.where(is_read, block_id, -1), order, axis=-1)
    mask = jnp.take_along_axis(jnp.where(is_read, mask, 0), order, axis=-1)
    count = is_read.sum(-1, dtype=jnp.int32)
    return BlockSelection(
        block_id[None], count[None], mask[None], QUERY_BLOCK, KEY_BLOCK
    )


def count_pairs(choice_BTGA):
    """Pairs of queries and keys, of all query heads, that tokens chose and causality allows."""
    T = choice_BTGA.shape[1]
    newest_T11 = jnp.arange(T, dtype=jnp.int32)[:, None, None]
    keys = jnp.clip(newest_T11 - choice_BTGA * KEY_BLOCK + 1, 0, KEY_BLOCK)
    keys = jnp.where(choice_BTGA < 0, 0, keys)
    return H // G * float(keys.sum((0, 2, 3)).astype(jnp.float32).sum())


def measure(length, pool, flags):
    """Records of both implementations and passes at one length."""
    case = bench_cases.Case(
        f"nsa_pool{pool}", H, G, K, QUERY_BLOCK, KEY_BLOCK, masked=True
    )
    arrays = bench_cases.make_arrays(case, length)
    choice_BTGA, selection = jax.jit(draw, static_argnums=(0, 1))(length, pool)
    flop = 4 * K * count_pairs(choice_BTGA)
    base = {"part": "nsa", "case": case.name, "length": length, "pool": pool}
    base["union_blocks"] = float(selection.count_BGQ.astype(jnp.float32).mean())
    results, ms = {}, {}
    for of_pass in bench_timing.PASSES:
        record = base | {"pass": of_pass, "implementation": flags.implementation}
        try:
            function = bench_timing.compile_pass(
                case, length, flags.implementation, of_pass, selection
            )
            ms[of_pass], repeats, results[of_pass] = bench_timing.measure(
                function, (arrays, selection), flags.repeats, flags.seconds
            )
            rate = flop * bench_timing.WORK[of_pass] / ms[of_pass] / 1e9
            record |= {"ms": ms[of_pass], "repeats": repeats, "tflops": rate}
        except Exception as error:  # noqa: BLE001 a record beside others
            record |= bench_timing.describe_failure(error)
        yield record
    base |= {"implementation": "fla_nsa"}
    try:
        passes = _prepare_peer(arrays, choice_BTGA)
    except Exception as error:  # noqa: BLE001 torch and triton raise what they like
        yield base | bench_timing.describe_failure(error)
        return
    for of_pass, run in passes.items():
        record = base | {"pass": of_pass}
        try:
            peer_ms, repeats, result = bench_timing.measure_torch(
                run, flags.repeats, flags.seconds
            )
            rate = flop * bench_timing.WORK[of_pass] / peer_ms / 1e9
            record |= {"ms": peer_ms, "repeats": repeats, "tflops": rate}
            if of_pass in ms:
                record["ours_over_this"] = peer_ms / ms[of_pass]
                record |= _compare(results.pop(of_pass), result)
        except Exception as error:  # noqa: BLE001
            record |= bench_timing.describe_failure(error)
        yield record


def _prepare_peer(arrays, choice_BTGA):
    """{pass: function without arguments} of the operator; results are torch tensors, as `compile_pass` orders them.

    Raises:
        ImportError: torch, triton or fla is missing.
    """
    import torch
    from fla.ops.nsa import parallel

    q, k, v, d_out = (
        torch.from_dlpack(x).requires_grad_(i < 3) for i, x in enumerate(arrays)
    )
    choice = torch.from_dlpack(choice_BTGA)

    def attend():
        # Blocks, how many of them, their tokens, the scale, no packed sequences.
        return parallel.ParallelNSAFunction.apply(
            q, k, v, choice, CHOSEN, KEY_BLOCK, K**-0.5, None
        )

    def forward():
        with torch.no_grad():
            return (attend(),)

    def both():
        out = attend()
        return out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)

    return dict(zip(bench_timing.PASSES, (forward, both)))


def _compare(ours, peers):
    """Largest difference between both results, relative to the largest entry."""
    import torch

    found = {}
    for name, x, y in zip(bench_timing.GRADIENTS, ours, peers):
        x, y = torch.from_dlpack(x).float(), y.float()
        found[f"difference_{name}"] = float((x - y).abs().max() / y.abs().max())
    return found
