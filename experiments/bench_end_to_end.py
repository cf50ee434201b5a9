"""A bookmark layer's attention from queries and keys to its output, against dense attention, for `bench_kernels`.

One program builds the index, lets every token choose, unites the choices and attends, through the functions that the
model calls; its four steps are timed apart, too. Keys come in runs of one topic, and a query asks for its run's topic, so
that neighbours ask for the same blocks, though not in the same order.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bsa.index import build, local, metrics, route, settings, unite
from bsa.parallel import attend as attend_lib
from bsa.parallel import mesh, select
from experiments import bench_timing

H, G, K = 16, 4, 128
WINDOW_TOKENS = 256
RUN_TOKENS, RUNS_OF_TOPIC = 64, 16
BACKWARD_LENGTH = 2**18
"""Longest text for which dense attention's backward is timed, and XLA checks what a kernel chose."""
COARSEST_POINTS = 2**14
"""Levels are added until the coarsest chapters have at most so many points."""
FLAT = settings.IndexSettings(
    C=16,
    span_blocks=1,
    span_min_blocks=1,
    span_similarity=0.8,
    query_block=16,
    J=81,
    sink_tokens=16,
    R=2,
    lloyd_steps=2,
    A=8,
    top_p=1.0,
    min_share=0.0,
    open_tokens=16,
    X=0,
    query_pool="mean",
    route_tokens=1024,
    digest="clusters",
    store="float32",
    route="flat",
    chapter_bookmarks=32,
    chapter_by="position",
    volume_chapters=1,
    chapter_levels=1,
    chapter_R=8,
    beam=8,
    P=0,
    children=16,
    similarity="cosine",
    link_by="means",
    frontier=32,
    hops=2,
)
"""Lists of 1,296 tokens: sinks, a window of 256 and what 31 tokens chose, 8 blocks each."""


def settings_for(route_name, length):
    """The index of one route; as many levels as the text asks for.

    Args:
        route_name: like "chapters-max-float8-16x4": by best points, chapters compared in float8, of 16 bookmarks with 4
            points; parts may be left out.
    """
    route_name, *parts = route_name.split("-")
    sizes = [part for part in parts if part[0].isdigit()]
    group, chapter_R = FLAT.chapter_bookmarks, FLAT.chapter_R
    if sizes:
        group, chapter_R = map(int, sizes[0].split("x"))
    num, levels = length // FLAT.C // group, 1
    while num * chapter_R > COARSEST_POINTS:
        num, levels = num // group, levels + 1
    return dataclasses.replace(
        FLAT,
        route=route_name,
        chapter_bookmarks=group,
        chapter_R=chapter_R,
        chapter_levels=levels,
        point_pool="max" if "max" in parts else FLAT.point_pool,
        chapter_store="float8" if "float8" in parts else FLAT.chapter_store,
        P=8 if route_name == "graph" else 0,
    )


def draw(length):
    """Random q, k, v, the tokens' positions, and a cotangent of out; in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 6)
    num_runs = length // RUN_TOKENS
    num_topics = max(2, num_runs // RUNS_OF_TOPIC)
    center = jax.random.normal(keys[0], (num_topics, G, K), jnp.bfloat16)
    topic = jax.random.randint(keys[1], (num_runs,), 0, num_topics)
    wish = jnp.repeat(center[topic], RUN_TOKENS, axis=0)

    def noise(key, heads):
        return jax.random.normal(key, (1, length, heads, K), jnp.bfloat16)

    return (
        jnp.repeat(wish, H // G, axis=1) + noise(keys[2], H),
        wish + noise(keys[3], G),
        noise(keys[4], G),
        jnp.arange(length, dtype=jnp.int32)[None],
        noise(keys[5], H),
    )


def make_steps(index, attended_by, searched_by):
    """The steps of a layer, and all of them: {name: function of arrays}.

    Args:
        attended_by, searched_by: implementations.
    """

    def see(position_BT):
        return local.window(
            position_BT,
            window_tokens=WINDOW_TOKENS,
            sink_tokens=index.sink_tokens,
            key_block=index.C,
        )

    def build_index(k, position_BT):
        return build.build_index(k, index, see(position_BT).start_BT)

    def search(q, bookmarks, position_BT):
        return route.search_blocks(
            q,
            None,  # Keys are for the exact step.
            bookmarks,
            see(position_BT).open_blocks,
            index,
            scale=K**-0.5,
            is_row=True,
            implementation=searched_by,
        )

    def unite_choices(choice, position_BT):
        return unite.unite(choice, see(position_BT), index, G)

    def attend(q, k, v, lists, position_BT):
        return attend_lib.block_sparse_attention(
            q,
            k,
            v,
            lists,
            jnp.zeros_like(position_BT),
            mesh.ALONE,
            scale=K**-0.5,
            implementation=attended_by,
        )

    def forward(q, k, v, position_BT):
        _, lists, _ = select.choose(
            q,
            k,
            see(position_BT),
            index,
            mesh.ALONE,
            scale=K**-0.5,
            implementation=searched_by,
        )
        return attend(q, k, v, lists, position_BT)

    return {
        "build": build_index,
        "route": search,
        "unite": unite_choices,
        "attend": attend,
        "forward": forward,
        "forward+backward": _with_backward(forward),
    }


def attend_densely(q, k, v, position_BT):
    """cuDNN's attention to all that is before a token, wherever that is."""
    del position_BT
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _with_backward(forward):
    def both(q, k, v, position_BT, d_out):
        out, pull = jax.vjp(lambda *arrays: forward(*arrays, position_BT), q, k, v)
        return out, *pull(d_out)

    return both


def measure_dense(length, flags, dense):
    """Records of dense attention; adds {(pass, length): milliseconds} to `dense`."""
    arrays = jax.jit(draw, static_argnums=0)(length)
    passes = {
        "forward": attend_densely,
        "forward+backward": _with_backward(attend_densely),
    }
    for name, function in passes.items():
        if name not in flags.passes:
            continue
        if name != "forward" and length > BACKWARD_LENGTH:
            continue
        base = {"length": length, "pass": name, "implementation": "cudnn"}
        record, _ = _time(function, _inputs(name, arrays), base, flags)
        if "ms" in record:
            dense[name, length] = record["ms"]
        yield record


def measure(length, route_name, flags, dense):
    """Records of a layer, whole and step by step.

    Args:
        route_name: as for `settings_for`; with ":xla" behind it if XLA is to search.
        dense: as `measure_dense` leaves it.
    """
    name, _, searched_by = route_name.partition(":")
    searched_by = searched_by or flags.implementation
    index = settings_for(name, length)
    steps = make_steps(index, flags.implementation, searched_by)
    arrays = jax.jit(draw, static_argnums=0)(length)
    q, k, v, position_BT, _ = arrays
    base = {
        "length": length,
        "route": route_name,
        "implementation": flags.implementation,
    }
    for name in [x for x in bench_timing.PASSES if x in flags.passes]:
        inputs = _inputs(name, arrays)
        record, result = _time(steps[name], inputs, base | {"pass": name}, flags)
        if "ms" in record and (name, length) in dense:
            record["times_dense"] = dense[name, length] / record["ms"]
        del result
        yield record
    record, bookmarks = _time(
        steps["build"], (k, position_BT), base | {"pass": "build"}, flags
    )
    yield record
    record, found = _time(
        steps["route"], (q, bookmarks, position_BT), base | {"pass": "route"}, flags
    )
    if found is None:
        yield record
        return
    choice, scored = found
    record["scored_nodes"] = float(scored.astype(jnp.float32).mean())
    if searched_by != "xla" and length <= BACKWARD_LENGTH:
        search = make_steps(index, "xla", "xla")["route"]
        expected, _ = jax.jit(search)(q, bookmarks, position_BT)
        record["recall"] = float(jax.jit(metrics.recall)(choice, expected).mean())
    yield record
    record, united = _time(
        steps["unite"], (choice, position_BT), base | {"pass": "unite"}, flags
    )
    if united is None:
        yield record
        return
    lists, refused = united
    union_blocks = float(lists.count_BGQ.astype(jnp.float32).mean())
    refused = float(refused.astype(jnp.float32).mean())
    yield record | {"union_tokens": union_blocks * index.C, "refused_blocks": refused}
    record, _ = _time(
        steps["attend"], (q, k, v, lists, position_BT), base | {"pass": "attend"}, flags
    )
    yield record


def _inputs(of_pass, arrays):
    """The arrays of a pass: without a cotangent if there is no backward."""
    return arrays[:-1] if of_pass == "forward" else arrays


def _time(function, arrays, base, flags):
    """A record of one function with its temporary memory, and its result: None if it failed."""
    record = {"part": "end_to_end"} | base
    try:
        compiled = jax.jit(function).lower(*arrays).compile()
        memory = compiled.memory_analysis()
        record["temporary_bytes"] = memory.temp_size_in_bytes
        ms, repeats, result = bench_timing.measure(
            compiled, arrays, flags.repeats, flags.seconds
        )
    except Exception as error:  # noqa: BLE001 a record beside others
        return record | bench_timing.describe_failure(error), None
    return record | {"ms": ms, "repeats": repeats}, result
