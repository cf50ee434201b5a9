"""Sums over pieces of rows on a Hopper GPU: the same order, and so the same bits, every time.

XLA's own segmented sums add by atomics, in the order in which threads happen to come.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_plan

PROGRAM_ELEMENTS = 4096
"""Elements that a thread block sums up: 32 a thread."""


def sum_pieces(x, first_piece_BGN, scale, dtype, interpret):
    """Adds up consecutive pieces.

    Args:
        x: float32[B, G, P, tile, K]; piece p belongs to tile n if it is one of
            first_piece[n] up to first_piece[n + 1], which it doesn't include.
        scale: multiplies the sums.
    Returns:
        [B, G, S, K] in `dtype`, all tiles in a row; zeros for one without pieces.
    """
    B, G, _, keys, K = x.shape
    num_tiles = first_piece_BGN.shape[-1] - 1
    rows = min(keys, PROGRAM_ELEMENTS // K)
    layout = plgpu.Layout.WG_STRIDED((rows, K), vec_size=4)

    def attend_sum(x_ref, first_piece_ref, out_ref):
        rest, part = mosaic_gpu_plan.divide(lax.axis_index("program"), keys // rows)
        rest, n = mosaic_gpu_plan.divide(rest, num_tiles)
        b, g = mosaic_gpu_plan.divide(rest, G)
        some = pl.ds(part * rows, rows)

        def add(piece, total):
            return total + plgpu.load(x_ref.at[b, g, piece, some], layout=layout)

        total = lax.fori_loop(
            first_piece_ref[b, g, n],
            first_piece_ref[b, g, n + 1],
            add,
            plgpu.layout_cast(jnp.zeros((rows, K), jnp.float32), layout),
        )
        total = (total * scale).astype(dtype)
        out_ref.at[b, g, pl.ds(n * keys + part * rows, rows)][...] = total

    kernel = plgpu.kernel(
        attend_sum,
        out_type=jax.ShapeDtypeStruct((B, G, num_tiles * keys, K), dtype),
        grid=(math.prod((B, G, num_tiles, keys // rows)),),
        grid_names=("program",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    return kernel(x, first_piece_BGN)
