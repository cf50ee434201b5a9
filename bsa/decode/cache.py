"""What decoding remembers of a text: `Cache`, a pytree that goes into each step and comes out of it.

Window and chunked layers keep the sinks and a ring of the last blocks, dense and bookmark layers, and those that follow
one, every block; bookmark layers also their index and the choices that later tokens may still read. Memory is linear in tokens; `bytes_per_token`
says how much.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bsa.decode import blocks, settings
from bsa.decode import host as hosts
from bsa.decode import pages as paging
from bsa.index import grow, grow_rows
from bsa.model import attention
from bsa.model import settings as model_settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's memory.

    Attributes:
        k, v: keys as attention gets them, and values; None where the host has them.
        pages: which blocks are still kept; None where all are.
        host: where the host has keys and values, else None.
        near: which of the host's blocks are on the device besides; None where it has none.
        index: bookmarks, with a length for each row; None but in bookmark layers.
        recent_BGTA: int32, what the last tokens chose, the newest last; None but in bookmark layers.
        again_BGTA: the same of those who asked again; None where nobody does.
        earlier_BSGK: the index's keys of the last tokens, which later ones are mixed with; None where none are.
    """

    k: blocks.Blocks | None
    v: blocks.Blocks | None
    index: grow.GrowingIndex | None
    recent_BGTA: jax.Array | None
    again_BGTA: jax.Array | None
    pages: paging.Pages | None
    earlier_BSGK: jax.Array | None
    near: hosts.Near | None
    host: hosts.HostBlocks | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A text as far as it was read; each row is one document.

    Attributes:
        layers: one `LayerCache` a layer.
        length_B: int32, tokens read.
        room: capacity and precision.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array
    room: settings.CacheSettings = dataclasses.field(metadata={"static": True})


def empty(
    model: model_settings.ModelSettings, cache: settings.CacheSettings, batch: int
) -> Cache:
    """A cache of no tokens; all its memory is taken now, but for the host's.

    Raises:
        ValueError: see `check`.
    """
    check(model, cache)
    capacity_tokens = -(-cache.capacity_tokens // model.index.C) * model.index.C
    cache = dataclasses.replace(
        cache,
        capacity_tokens=capacity_tokens,
        piece_tokens=min(cache.piece_tokens, capacity_tokens),
    )
    layers = [
        _empty_layer(model, layer % len(model.pattern), cache, batch)
        for layer in range(model.L)
    ]
    return Cache(tuple(layers), jnp.zeros(batch, jnp.int32), cache)


def check(model: model_settings.ModelSettings, cache: settings.CacheSettings) -> None:
    """Whether a model can read out of such a cache.

    Raises:
        ValueError: blocks that are on the host, or gone, cannot give the exact step its keys; too few may be kept; or
            the model reads means of blocks, which are not kept.
    """
    if model.branch_gates:
        raise ValueError(
            "decode: model.branch_gates=True is for training and evaluation only: a cache keeps no means of values"
        )
    if (cache.store == "host" or cache.kept_tokens) and model.ask_again:
        raise ValueError(
            f"decode: store={cache.store!r}, kept_tokens={cache.kept_tokens} with model.ask_again=True: a layer that reads twice "
            "keeps all blocks on the device"
        )
    if (cache.store == "host" or cache.kept_tokens) and model.index.X:
        raise ValueError(
            f"decode: store={cache.store!r}, kept_tokens={cache.kept_tokens} with index.X={model.index.X}: the exact step "
            "reads keys of all blocks on the device; set X to 0, and decode.answer_X"
        )
    _check_kept(model, cache)


def lead_blocks(model: model_settings.ModelSettings) -> int:
    """Query blocks before a token's own whose choices it may read."""
    return -(-(model.index.open_tokens - 1) // model.index.query_block)


def local_blocks(model: model_settings.ModelSettings, letter: int) -> tuple[int, int]:
    """Most blocks of a token's window or chunk, and sinks, in one letter of the pattern."""
    C, kind = model.index.C, model.pattern[letter]
    if kind == "c":
        return (model.chunk_tokens - 1) // C + 2, 0
    if kind == "s":
        return -(-(model.window_tokens[letter] - 1) // C) + 1, 0
    return model.window_tokens[letter] // C, attention.sink_tokens(model, letter) // C


def num_bytes(cache: Cache) -> int:
    """Memory of all arrays on the device."""
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def bytes_per_token(
    model: model_settings.ModelSettings, cache: settings.CacheSettings
) -> list[dict]:
    """What one more token of one row takes, for each layer of the pattern.

    Returns:
        `kind`, `kv_bytes` (keys and values) and `index_bytes` (bookmarks, chapters, links, where blocks lie) on
        the device: 0 where a layer keeps a bounded number of tokens, or the host keeps them.
    """

    def of_capacity(capacity_tokens, letter):
        sized = dataclasses.replace(
            cache, capacity_tokens=capacity_tokens, piece_tokens=model.index.C
        )
        layer = jax.eval_shape(lambda: _empty_layer(model, letter, sized, 1))
        return _tree_bytes((layer.k, layer.v)), _tree_bytes((layer.index, layer.pages))

    index = model.index
    volume_tokens = index.C * index.chapter_bookmarks * index.volume_chapters
    span = volume_tokens * index.chapter_bookmarks ** (index.chapter_levels - 1)
    local = max(*model.window_tokens, model.chunk_tokens, cache.kept_tokens)
    low = -(-(index.sink_tokens + local + 4 * index.C) // span) * span
    rows = []
    for letter, kind in enumerate(model.pattern):
        (kv, more), (kv_low, more_low) = (
            of_capacity(tokens, letter) for tokens in (low + span, low)
        )
        rows.append(
            {
                "kind": kind,
                "kv_bytes": (kv - kv_low) / span,
                "index_bytes": (more - more_low) / span,
            }
        )
    return rows


def _tree_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _empty_layer(model, letter, cache, batch):
    """The memory of one letter of the pattern."""
    index, kind = model.index, model.pattern[letter]
    num_blocks = cache.capacity_tokens // index.C
    sink_blocks = 0
    if kind in "swc":
        window_blocks, sink_blocks = local_blocks(model, letter)
        kept = sink_blocks + window_blocks + -(-cache.piece_tokens // index.C)
        num_blocks = min(kept, num_blocks)
    elif kind == "b" and cache.kept_tokens:
        num_blocks = min(cache.kept_tokens // index.C, num_blocks)
    shape = (batch, model.G, num_blocks, index.C, model.K)
    on_host = cache.store == "host" and kind in "bf"
    k, v = (
        None if on_host else blocks.empty(shape, model.dtype, cache.store, sink_blocks)
        for _ in range(2)
    )
    host = hosts.HostBlocks(shape, model.dtype) if on_host else None
    near = host and host.near(index.J)
    if kind != "b":
        return LayerCache(k, v, None, None, None, None, None, near, host)
    grown = grow.empty(
        batch,
        model.G,
        model.route_width or model.K,
        index,
        capacity_tokens=cache.capacity_tokens,
        dtype=model.dtype,
    )
    recent_tokens = (lead_blocks(model) + 1) * index.query_block - 1
    recent_BGTA = jnp.full((batch, model.G, recent_tokens, index.A), -1, jnp.int32)
    again_BGTA = jnp.copy(recent_BGTA) if model.ask_again else None
    pages = None
    if num_blocks < cache.capacity_tokens // index.C:
        all_blocks = cache.capacity_tokens // index.C
        pages = paging.empty(batch, model.G, all_blocks, num_blocks)
    earlier_BSGK = None
    if model.route_taps:
        shape = batch, model.route_taps - 1, model.G, model.route_width
        earlier_BSGK = jnp.zeros(shape, model.dtype)
    grown = grow_rows.per_row(grown)
    return LayerCache(
        *(k, v, grown, recent_BGTA, again_BGTA, pages, earlier_BSGK, near, host)
    )


def _check_kept(model, cache):
    """Raises ValueError unless all that a token must read finds room beside what comes in with a piece."""
    index = model.index
    always = index.sink_tokens + max(model.window_tokens) + index.query_block
    chosen = (index.query_block + index.open_tokens) * index.A * index.C
    least = always + chosen + 2 * (cache.piece_tokens + index.C)
    if cache.kept_tokens and cache.kept_tokens < least:
        raise ValueError(
            f"decode: kept_tokens={cache.kept_tokens}; sinks, window, open pages and two pieces take {least}"
        )
    if cache.kept_tokens and "f" in model.pattern:
        raise ValueError(
            f"decode: kept_tokens={cache.kept_tokens} with pattern {model.pattern!r}: f layers keep all blocks; set it to 0"
        )
    if cache.kept_tokens and cache.store == "host":
        raise ValueError("decode: store='host' keeps all blocks; set kept_tokens to 0")
