"""What a Mosaic TPU kernel knows while it is traced: sizes, rules, and how arrays are laid out for it.

The rows of a query block are its tokens times the H/G query heads that share a list, head
after head, cut into *parts* of whole heads. Tokens are padded to a power of two. Logits
stand with keys in sublanes and rows in lanes: then what a mask must know of a key block is
a scalar, and what it must know of a row a vector of one register. A *program* is one step
of a kernel's grid.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles

LANES = 128
"""Of a vector register."""
PART_ROWS = 256
"""Most rows of a part: the weighted values of 128 columns then take half the registers."""
COUNT, OWN, ENTRIES = 0, 1, 2
"""Places in a list: how many entries are real, the block that reads them, the first entry."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and rules of one call; letters as in `shapes`, padded except for `num_keys`.

    Attributes:
        tokens: of a query block, with padding; the first `query_block` are real.
    """

    B: int
    H: int
    G: int
    K: int
    Q: int
    J: int
    N: int
    query_block: int
    key_block: int
    tokens: int
    num_keys: int
    dtype: jnp.dtype
    scale: float
    causal: bool
    score_mod: Callable | None
    mask_mod: Callable | None
    has_mask: bool
    has_bias: bool
    has_segments: bool
    tiles: tiles.TpuTiles
    interpret: Any

    @property
    def heads(self):
        """Query heads that share a key/value head."""
        return self.H // self.G

    @property
    def part_heads(self):
        """Heads of a part."""
        fits = max(1, PART_ROWS // self.tokens)
        return max(x for x in range(1, fits + 1) if self.heads % x == 0)

    @property
    def parts(self):
        """Parts of a query block."""
        return self.heads // self.part_heads

    @property
    def rows(self):
        """Rows of a part."""
        return self.part_heads * self.tokens

    @property
    def groups(self):
        """Lists of lists: key/value heads of the whole batch."""
        return self.B * self.G

    @property
    def blocks(self):
        """Key blocks that a key tile gathers."""
        return max(1, self.tiles.keys // self.key_block)

    @property
    def bias_entries(self):
        """Entries of a list whose biases, one a token, share a register."""
        return LANES // self.tokens


def write_lists(count, own, *entries):
    """Packs lists for `gather`: int32[programs, 1, 2 + entries], count and own block first."""
    # Columns of one element would each take a row of lanes.
    lists = jnp.concatenate(entries, axis=-1)
    lists = jnp.pad(lists, [(0, 0)] * (lists.ndim - 1) + [(ENTRIES, 0)])
    place = jnp.arange(lists.shape[-1])
    lists = jnp.where(place == COUNT, count[..., None], lists)
    lists = jnp.where(place == OWN, own[..., None], lists)
    return lists.reshape(-1, 1, lists.shape[-1])


def split_grid(plan, programs, together=1):
    """Grid of programs in order: (TensorCores, programs of each).

    Args:
        together: programs of which all must run on one core.
    """
    cores = plan.tiles.cores
    cores = cores if programs // together % cores == 0 else 1
    return cores, programs // cores


def call(plan, body, grid, operands, specs, outputs, scratch, name, aliases=None):
    """Calls a kernel whose optional operands may be None.

    Args:
        body: function of the operands' refs, the outputs' and the scratch's.
        operands, specs: NamedTuples of one type: arrays, and their block specs.
        outputs: pairs of a shape and a block spec.
        aliases: name of an operand -> position of the output that it becomes.
    """
    names = [x for x, y in operands._asdict().items() if y is not None]

    def kernel(*refs):
        inputs = type(operands)(**{x: None for x in operands._fields})
        inputs = inputs._replace(**dict(zip(names, refs)))
        body(inputs, *refs[len(names) :])

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[getattr(specs, x) for x in names],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[scratch],
        input_output_aliases={names.index(x): y for x, y in (aliases or {}).items()},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # They cost more than the copies that they check.
            disable_bounds_checks=True,
        ),
        interpret=plan.interpret,
        name=name,
    )(*(getattr(operands, x) for x in names))


def blocked(array, length, locate=lambda program: program, space=pltpu.VMEM):
    """Spec that gives each program one entry of the first axis; None passes through."""
    if array is None:
        return None
    rest = array.shape[1:]

    def index(core, step):
        return (locate(core * length + step), *[0] * len(rest))

    return pl.BlockSpec((None, *rest), index, memory_space=space)


def unblocked(array, space=pltpu.HBM):
    """Spec of an array that a kernel sees whole; None passes through."""
    return None if array is None else pl.BlockSpec(memory_space=space)


def dot(x, y, x_axis, y_axis):
    """Matrix product over one axis of each, summed in float32; float32 is not rounded first."""
    is_wide = x.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if is_wide else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def to_rows(plan, x_BTHK):
    """Query tokens as rows: [B * G * Q, parts, rows, K]; None passes through."""
    if x_BTHK is None:
        return None
    B, G, Q, K = plan.B, plan.G, plan.Q, x_BTHK.shape[-1]
    x_BTHK = pad(x_BTHK, {1: Q * plan.query_block})
    x = x_BTHK.reshape(B, Q, plan.query_block, G, plan.heads, K)
    x = pad(x.transpose(0, 3, 1, 4, 2, 5), {4: plan.tokens})
    return x.reshape(B * G * Q, plan.parts, plan.rows, K)


def from_rows(plan, x, T):
    """Undoes `to_rows`: [B, T, H, K], K being whatever `x` has last."""
    B, G, Q, K = plan.B, plan.G, plan.Q, x.shape[-1]
    x = x.reshape(B, G, Q, plan.heads, plan.tokens, K)[..., : plan.query_block, :]
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, Q * plan.query_block, plan.H, K)[:, :T]


def to_key_blocks(plan, x_BSGK):
    """Keys as [B * G * N, C, K]."""
    B, _, G, K = x_BSGK.shape
    x_BSGK = pad(x_BSGK, {1: plan.N * plan.key_block})
    return x_BSGK.swapaxes(1, 2).reshape(B * G * plan.N, plan.key_block, K)


def from_key_blocks(plan, x, S, K):
    """Undoes `to_key_blocks` and the padding of K."""
    x_BGSK = x.reshape(plan.B, plan.G, plan.N * plan.key_block, plan.K)
    return x_BGSK.swapaxes(1, 2)[:, :S, :, :K]


def to_segment_rows(plan, x_BT):
    """Segment ids of a part's rows: [B * Q, 1, rows]; None passes through."""
    if x_BT is None:
        return None
    x = pad(x_BT, {1: plan.Q * plan.query_block}).reshape(-1, 1, plan.query_block)
    return jnp.tile(pad(x, {2: plan.tokens}), (1, 1, plan.part_heads))


def to_segment_blocks(plan, x_BS):
    """Segment ids of key blocks: [B * N, 1, LANES]; None passes through."""
    if x_BS is None:
        return None
    x = pad(x_BS, {1: plan.N * plan.key_block}).reshape(-1, 1, plan.key_block)
    return pad(x, {2: LANES})


def to_bias_rows(plan, bias_BGTJ):
    """Biases as [B * G * Q, J, tokens]; None passes through."""
    if bias_BGTJ is None:
        return None
    B, G, _, J = bias_BGTJ.shape
    bias_BGTJ = pad(bias_BGTJ, {2: plan.Q * plan.query_block})
    x = bias_BGTJ.reshape(B * G * plan.Q, plan.query_block, J)
    return pad(x.swapaxes(1, 2), {1: plan.J, 2: plan.tokens})


def from_bias_rows(plan, x, T, J):
    """Undoes `to_bias_rows`."""
    x = x.reshape(plan.groups * plan.Q, plan.J, plan.tokens)
    x = x[:, :J, : plan.query_block].swapaxes(1, 2)
    return x.reshape(plan.B, plan.G, plan.Q * plan.query_block, J)[:, :, :T]


def fold_lanes(x):
    """[..., J, tokens] as whole registers of lanes: [..., J * tokens / LANES, LANES]."""
    if x is None:
        return None
    *rest, J, tokens = x.shape
    return x.reshape(*rest, J * tokens // LANES, LANES)


def round_up(x, multiple):
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def pad(x, sizes):
    """Pads axes with zeros up to sizes, {axis: size}; None passes through."""
    if x is None:
        return None
    padding = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x


def num_slots(plan, sources, blocks):
    """Tiles of a ring that gathers `blocks` entries of each source: enough for the memory's latency.

    Args:
        sources: arrays whose first axis a list's entries point into, or None.
    """
    entry_bytes = sum(x.nbytes // x.shape[0] for x in sources if x is not None)
    fits = plan.tiles.ring_bytes // (blocks * entry_bytes)
    return max(2, min(plan.tiles.max_slots, fits))
