"""NSA's selected attention, as flash-linear-attention has it, on the tensors and choices of ours, for `bench_kernels`.

64 query heads share 4 key/value heads; each token reads 16 key blocks of 64: the first, the two newest, and 13 of its
own choice (arXiv 2502.11089). How many different ones neighbours choose decides what sharing their reads costs: 16 of
them choose from a pool of 13 (all alike), of 36, or of 208 (hardly any in common). Ours shares them among 16, 8 or 4
tokens. FLOPs of both count the pairs that tokens chose; what ours computes besides, and masks, costs it time.

The peer needs torch, triton and fla-core 0.6; only its operator on given blocks is called, without the compressed and
the sliding branch, and after it has tuned itself.
"""

from concurrent import futures

import jax
import jax.numpy as jnp

from experiments import bench_cases, bench_timing
from pallas_kernels import BlockSelection

H, G, K = 64, 4, 128
QUERY_BLOCKS, KEY_BLOCK = (16, 8, 4), 64
NEIGHBOURS = 16
"""Tokens that choose from one pool."""
CHOSEN = 16
DRAWN = CHOSEN - 3
POOLS = (13, 36, 208)
LONGEST = 2**17
"""Tokens; with longer texts the arrays of both, and their gradients, fill the card."""


def draw(length, pool):
    """Choices of single tokens, and the same as lists with token masks.

    Args:
        pool: blocks from which `NEIGHBOURS` choose.
    Returns:
        choice_BTGA: int32, -1 where there are fewer blocks before the token.
        {query_block: `BlockSelection` with a row for each query block's union}.
    """
    Q = length // NEIGHBOURS
    pool_key, choice_key = jax.random.split(jax.random.key(1))
    own_Q1 = (jnp.arange(Q, dtype=jnp.int32) * NEIGHBOURS // KEY_BLOCK)[:, None]
    edge = jnp.arange(pool + 1) * jnp.maximum(own_Q1 - 2, 0) // pool
    drawn = jax.random.randint(pool_key, (G, Q, pool), edge[:, :-1], edge[:, 1:])
    pool_id = jnp.where(edge[:, 1:] > edge[:, :-1], 1 + drawn, -1).astype(jnp.int32)

    wish = jax.random.uniform(choice_key, (G, Q, NEIGHBOURS, pool))
    wish, place = jax.lax.top_k(jnp.where(pool_id[:, :, None] < 0, -1, wish), DRAWN)
    place = jnp.where(wish < 0, -1, place)
    is_chosen = (place[..., None] == jnp.arange(pool)).any(-2)

    newest_Q2 = jnp.concatenate([own_Q1, own_Q1 - 1], axis=1)
    newest_Q2 = jnp.where(newest_Q2 > 0, newest_Q2, -1)
    fixed_Q3 = jnp.pad(newest_Q2, ((0, 0), (1, 0)))
    fixed = jnp.broadcast_to(fixed_Q3, (G, Q, 3))
    picked = jnp.take_along_axis(pool_id[:, :, None], jnp.maximum(place, 0), axis=-1)
    choice = jnp.concatenate(
        [
            jnp.broadcast_to(fixed[:, :, None], (G, Q, NEIGHBOURS, 3)),
            jnp.where(place < 0, -1, picked),
        ],
        axis=-1,
    )
    choice_BTGA = choice.reshape(1, G, length, CHOSEN).swapaxes(1, 2)
    block_id = jnp.concatenate([fixed, pool_id], axis=-1)
    is_read = jnp.pad(is_chosen, ((0, 0),) * 3 + ((3, 0),), constant_values=True)
    lists = {x: _unite(block_id, is_read, x) for x in QUERY_BLOCKS}
    return choice_BTGA, lists


def _unite(block_id, is_read, query_block):
    """Lists of what the tokens of query blocks read.

    Args:
        block_id: [G, Q, blocks] from which `NEIGHBOURS` choose, -1 for none.
        is_read: [G, Q, tokens, blocks].
    """
    blocks = is_read.shape[-1]
    is_read = is_read.reshape(G, -1, query_block, blocks)
    block_id = jnp.repeat(block_id, NEIGHBOURS // query_block, axis=1)
    bit = jnp.uint32(1) << jnp.arange(query_block, dtype=jnp.uint32)[:, None]
    mask = jnp.where(is_read, bit, 0).sum(-2, dtype=jnp.uint32)
    is_listed = (block_id >= 0) & (mask > 0)
    longest = min(blocks, CHOSEN - DRAWN + query_block * DRAWN)
    order = jnp.argsort(~is_listed, axis=-1, stable=True)[..., :longest]
    block_id = jnp.take_along_axis(jnp.where(is_listed, block_id, -1), order, axis=-1)
    mask = jnp.take_along_axis(jnp.where(is_listed, mask, 0), order, axis=-1)
    count = is_listed.sum(-1, dtype=jnp.int32)
    return BlockSelection(
        block_id[None], count[None], mask[None], query_block, KEY_BLOCK
    )


def count_pairs(choice_BTGA):
    """Pairs of queries and keys, of all query heads, that tokens chose and causality allows."""
    T = choice_BTGA.shape[1]
    newest_T11 = jnp.arange(T, dtype=jnp.int32)[:, None, None]
    keys = jnp.clip(newest_T11 - choice_BTGA * KEY_BLOCK + 1, 0, KEY_BLOCK)
    keys = jnp.where(choice_BTGA < 0, 0, keys)
    return H // G * float(keys.sum((0, 2, 3)).astype(jnp.float32).sum())


def measure(length, pool, flags):
    """Records of ours, for each query block and pass, and then of the peer, which is compared with the fastest of them."""
    cases = [
        bench_cases.Case(f"nsa_pool{pool}", H, G, K, x, KEY_BLOCK, masked=True)
        for x in QUERY_BLOCKS
    ]
    arrays = bench_cases.make_arrays(cases[0], length)
    choice_BTGA, lists = jax.jit(draw, static_argnums=(0, 1))(length, pool)
    flop = 4 * K * count_pairs(choice_BTGA)
    base = {"part": "nsa", "case": cases[0].name, "length": length, "pool": pool}
    fastest = {}
    with futures.ThreadPoolExecutor() as compilers:
        compiled = {
            (case, of_pass): compilers.submit(
                *(bench_timing.compile_pass, case, length, flags.implementation),
                *(of_pass, lists[case.query_block]),
            )
            for case in cases
            for of_pass in bench_timing.PASSES
        }
        futures.wait(compiled.values())  # A machine that compiles is a poor clock.
    for (case, of_pass), function in compiled.items():
        selection = lists[case.query_block]
        record = base | {"pass": of_pass, "implementation": flags.implementation}
        record["query_block"] = case.query_block
        record["union_blocks"] = float(selection.count_BGQ.astype(jnp.float32).mean())
        try:
            ms, repeats, result = bench_timing.measure(
                function.result(), (arrays, selection), flags.repeats, flags.seconds
            )
            rate = flop * bench_timing.WORK[of_pass] / ms / 1e9
            record |= {"ms": ms, "repeats": repeats, "tflops": rate}
            if of_pass not in fastest or ms < fastest[of_pass][0]["ms"]:
                fastest[of_pass] = record, result
            del result
        except Exception as error:  # noqa: BLE001 a record beside others
            record |= bench_timing.describe_failure(error)
        yield record
    yield from _measure_peer(
        base | {"implementation": "fla_nsa"}, arrays, choice_BTGA, flop, fastest, flags
    )


def _measure_peer(base, arrays, choice_BTGA, flop, fastest, flags):
    """Records of flash-linear-attention's operator.

    Args:
        base: what they have in common.
        fastest: {pass: record and result of ours}.
    """
    try:
        passes = _prepare_peer(arrays, choice_BTGA)
    except Exception as error:  # noqa: BLE001 torch and triton raise what they like
        yield base | bench_timing.describe_failure(error)
        return
    for of_pass, run in passes.items():
        record = base | {"pass": of_pass}
        try:
            ms, repeats, result = bench_timing.measure_torch(
                run, flags.repeats, flags.seconds
            )
            rate = flop * bench_timing.WORK[of_pass] / ms / 1e9
            record |= {"ms": ms, "repeats": repeats, "tflops": rate}
            if of_pass in fastest:
                ours, our_result = fastest.pop(of_pass)
                record["ours_over_this"] = ms / ours["ms"]
                record["compared_query_block"] = ours["query_block"]
                record |= _compare(our_result, result)
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
