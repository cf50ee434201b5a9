"""What a Triton kernel knows when it is compiled, what it reads, and how it is called."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_operands, tiles, transpose

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and rules of one call; letters as in `shapes`, padded except for `num_keys`.

    The only static argument of a kernel, which reads it attribute by attribute.
    """

    B: int
    T: int
    S: int
    H: int
    G: int
    K: int
    Q: int
    J: int
    query_block: int
    key_block: int
    num_keys: int
    scale: float
    causal: bool
    has_mask: bool
    has_bias: bool
    has_segments: bool
    tiles: tiles.TritonTiles

    @property
    def heads(self):
        """Query heads that share a key/value head."""
        return self.H // self.G

    @property
    def rows(self):
        """Rows of a tile."""
        return self.tiles.rows

    @property
    def parts(self):
        """Tiles that read the same list."""
        return -(-self.heads * self.query_block // self.rows)

    @property
    def keys(self):
        """Keys of a tile."""
        return self.tiles.keys

    @property
    def blocks(self):
        """Key blocks that a tile gathers."""
        return self.keys // self.key_block

    @property
    def is_scaled(self):
        """Whether logits are scaled before the softmax, and not by its multiplication."""
        return self.has_bias or self.scale <= 0

    @property
    def to_bits(self):
        """What turns a logit into a power of two."""
        return LOG2E if self.is_scaled else self.scale * LOG2E

    @property
    def num_blocks(self):
        """Key blocks."""
        return self.S // self.key_block

    @property
    def piece_readers(self):
        """Most query blocks that one program for dK and dV reads."""
        return max(1, self.tiles.piece_steps // self.parts)

    @property
    def num_pieces(self):
        """Programs for dK and dV, of one batch and key/value head."""
        entries = self.Q * self.J
        return transpose.max_pieces(entries, self.num_blocks, self.piece_readers)


class Operands(NamedTuple):
    """Arrays that every kernel reads, padded; None stands for what a call lacks.

    `first_position_BQ` is the position in k of the first token of each query block.
    """

    q_BTHK: Any
    k_BSGK: Any
    v_BSGK: Any
    first_position_BQ: Any
    token_mask_BGQJ: Any
    bias_BGTJ: Any
    segment_query_BT: Any
    segment_key_BS: Any


def prepare(sizes, rules, differentiated, others):
    """Fits a call to tiles.

    Args:
        sizes: `TritonTiles` of this pass; a list with fewer rows gets smaller ones.
        rules: `Options` without offsets.
        differentiated: q, k, v and bias, as the caller has them.
        others: selection, segment ids, and `Operands.first_position_BQ`.
    Returns:
        `Plan`, `Operands`, and the selection with blocks that fit a tile.
    """
    q_BTHK, k_BSGK, v_BSGK, bias_BGTJ = differentiated
    selection, segment_ids, first_position_BQ = others
    (B, _, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    # The last block is listed whole, whichever way it is halved.
    num_keys, S = S, mosaic_gpu_operands.round_up(S, selection.key_block)
    while selection.key_block > sizes.keys:
        selection, bias_BGTJ = mosaic_gpu_operands.halve_blocks(selection, bias_BGTJ)
    Q, J = selection.block_id_BGQJ.shape[2:]
    list_rows = _power_of_two(H // G * selection.query_block)
    plan = Plan(
        B=B,
        T=Q * selection.query_block,
        S=S,
        H=H,
        G=G,
        K=_power_of_two(K),
        Q=Q,
        J=J,
        query_block=selection.query_block,
        key_block=selection.key_block,
        num_keys=num_keys,
        scale=rules.scale,
        causal=rules.causal,
        has_mask=selection.token_mask_BGQJ is not None,
        has_bias=bias_BGTJ is not None,
        has_segments=segment_ids is not None,
        tiles=dataclasses.replace(sizes, rows=min(sizes.rows, list_rows)),
    )
    query_BT, key_BS = (None, None) if segment_ids is None else segment_ids
    pad = mosaic_gpu_operands.pad
    operands = Operands(
        q_BTHK=pad(q_BTHK, {1: plan.T, 3: plan.K}),
        k_BSGK=pad(k_BSGK, {1: plan.S, 3: plan.K}),
        v_BSGK=pad(v_BSGK, {1: plan.S, 3: plan.K}),
        first_position_BQ=first_position_BQ,
        token_mask_BGQJ=selection.token_mask_BGQJ,
        bias_BGTJ=pad(bias_BGTJ, {2: plan.T}),
        segment_query_BT=pad(query_BT, {1: plan.T}),
        segment_key_BS=pad(key_BS, {1: plan.S}),
    )
    return plan, operands, selection


def call(kernel, plan, arrays, out_type, grid, capability):
    """Calls a kernel, `(*arrays, *outputs, plan)`, once for each cell of a grid.

    Args:
        arrays: None becomes a pointer that must not be read.
        capability: of the card, ten times the number that NVIDIA gives it.
    """
    import jax_triton  # Most machines lack it.

    nothing = jnp.zeros(1, jnp.int32)
    return jax_triton.triton_call(
        *[nothing if x is None else x for x in arrays],
        kernel=kernel,
        out_shape=out_type,
        grid=grid,
        num_warps=plan.tiles.warps,
        num_stages=plan.tiles.stages,
        compute_capability=capability,
        plan=plan,
    )


def shape(dtype, *sizes):
    """What a kernel writes."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def _power_of_two(x):
    """The smallest power of two that is at least x, and 16, a tensor core's tile."""
    return max(16, 1 << (x - 1).bit_length())
