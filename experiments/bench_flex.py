"""PyTorch's FlexAttention on the arrays and lists of `bench_kernels`, in the same process.

Blocks below the diagonal are given as full ones, which spares their masks; those on the
diagonal get a causal `mask_mod`.
"""

import jax.numpy as jnp

from experiments import bench_timing


def measure(case, arrays, selection, repeats, seconds):
    """Median times of FlexAttention in milliseconds: {pass: (ms, repeats)}.

    Raises:
        ImportError: there is no torch.
    """
    import torch
    from torch.nn.attention import flex_attention

    q, k, v, d_out = (
        torch.from_dlpack(x).transpose(1, 2).contiguous().requires_grad_(i < 3)
        for i, x in enumerate(arrays)
    )
    mask = _make_mask(case, selection, q.shape[2], flex_attention)
    attend = torch.compile(flex_attention.flex_attention, dynamic=False)

    def forward():
        with torch.no_grad():
            attend(q, k, v, block_mask=mask, enable_gqa=True)

    def both():
        out = attend(q, k, v, block_mask=mask, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), d_out)

    found = {}
    for name, run in zip(bench_timing.PASSES, (forward, both)):
        found[name] = bench_timing.measure_torch(run, repeats, seconds)[:2]
    return found


def _make_mask(case, selection, length, flex_attention):
    """The lists as a `BlockMask`, whose tables are as wide as there are key blocks."""
    import torch

    if case.query_block != case.key_block or case.masked:
        raise ValueError("FlexAttention gets square blocks without token masks here")
    Q = length // case.query_block
    block_id = selection.block_id_BGQJ
    is_full = (block_id >= 0) & (block_id < jnp.arange(Q)[:, None])

    def table(wanted):
        """Counts, and the wanted ids in front, for every query head."""
        order = jnp.argsort(~wanted, axis=-1, stable=True)
        ids = jnp.take_along_axis(jnp.maximum(block_id, 0), order, axis=-1)
        ids = jnp.pad(ids, ((0, 0), (0, 0), (0, 0), (0, Q - ids.shape[-1])))
        pair = wanted.sum(-1).astype(jnp.int32), ids
        repeat = case.H // case.G
        return [torch.from_dlpack(jnp.repeat(x, repeat, axis=1)) for x in pair]

    partial = table((block_id >= 0) & ~is_full)
    return flex_attention.BlockMask.from_kv_blocks(
        *partial,
        *table(is_full),
        BLOCK_SIZE=case.key_block,
        mask_mod=lambda b, h, q_id, k_id: k_id <= q_id,
    )
