"""Random calls of a kernel against the oracle, values and gradients, for `bench_kernels`.

Few settings, since each is compiled, and many draws of lists, counts, masks and offsets.
"""

import dataclasses
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockSelection, SegmentIds, block_sparse_attention

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes and options; letters as in `pallas_kernels.shapes`."""

    query_block: int
    key_block: int
    T: int = 500
    S: int = 700
    H: int = 4
    G: int = 2
    K: int = 128
    J: int = 12
    masked: bool = False
    biased: bool = False
    segments: int = 0
    causal: bool = True
    softcap: float | None = None
    dtype: str = "bfloat16"


SETTINGS = (
    Setting(128, 128, J=5),
    Setting(128, 128, J=5, H=8, G=1, causal=False),
    Setting(128, 16, J=40, T=333),
    Setting(64, 64, K=64, S=1023, biased=True),
    Setting(64, 128, J=4, K=256, H=2, G=1),
    Setting(32, 16, masked=True, J=40, softcap=20.0),
    Setting(32, 128, masked=True, J=5, softcap=20.0),
    Setting(32, 32, K=80, H=6, masked=True, dtype="float16"),
    Setting(16, 16, masked=True, J=40, segments=3),
    Setting(16, 16, masked=True, biased=True, segments=2, H=8, S=640),
    Setting(16, 128, H=3, G=3, J=5, T=250),
    Setting(8, 16, H=32, masked=True, biased=True, J=40, segments=3, T=250),
    Setting(4, 64, H=32, masked=True, T=250),
)


def _fit(setting, implementation):
    """The setting without the softcap that `triton` refuses, but in float32, which it takes."""
    if implementation == "triton" and setting.softcap:
        return dataclasses.replace(setting, softcap=None, dtype="float32")
    return setting


def _draw(setting, seed):
    """Arrays of a call, and the cotangents of its results."""
    c, rng = setting, np.random.default_rng(seed)
    Q, N = -(-c.T // c.query_block), -(-c.S // c.key_block)
    count = rng.integers(1, min(c.J, N) + 1, (2, c.G, Q))
    count = np.where(rng.random(count.shape) < 0.2, 0, count).astype(np.int32)
    block_id = np.full((*count.shape, c.J), -1, np.int32)
    for place in np.ndindex(count.shape):
        chosen = rng.permutation(N)[: count[place]]
        if rng.random() < 0.7 and count[place] and 0 not in chosen:
            chosen[0] = 0
        block_id[place][: count[place]] = chosen
    mask = rng.integers(0, 2**32, block_id.shape, dtype=np.uint32)

    def normal(dtype, *shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def segments(length):
        return jnp.asarray(np.sort(rng.integers(0, c.segments, (2, length))), jnp.int32)

    return {
        "arrays": (
            normal(c.dtype, 2, c.T, c.H, c.K),
            normal(c.dtype, 2, c.S, c.G, c.K),
            normal(c.dtype, 2, c.S, c.G, c.K),
            normal("float32", 2, c.G, c.T, c.J) if c.biased else None,
        ),
        "selection": BlockSelection(
            jnp.asarray(block_id),
            jnp.asarray(count),
            jnp.asarray(mask & (2**c.query_block - 1)) if c.masked else None,
            c.query_block,
            c.key_block,
        ),
        "segment_ids": SegmentIds(segments(c.T), segments(c.S)) if c.segments else None,
        "offsets": jnp.asarray(rng.integers(0, 600, 2), jnp.int32),
        "cotangents": (
            normal(c.dtype, 2, c.T, c.H, c.K),
            normal("float32", 2, c.H, c.T),
        ),
    }


def _compile(setting, implementation, draw):
    """out, lse and all gradients, as a compiled function of a draw."""
    score_mod = None
    if setting.softcap:
        cap = setting.softcap

        def score_mod(s, b, h, q_id, k_id):
            return cap * jnp.tanh(s / cap)

    def run(draw):
        def attend(q_BTHK, k_BSGK, v_BSGK, bias_BGTJ):
            return block_sparse_attention(
                q_BTHK,
                k_BSGK,
                v_BSGK,
                draw["selection"],
                scale=setting.K**-0.5,
                bias_BGTJ=bias_BGTJ,
                segment_ids=draw["segment_ids"],
                score_mod=score_mod,
                causal=setting.causal,
                query_offset=draw["offsets"][0],
                key_offset=draw["offsets"][1],
                implementation=implementation,
            )

        results, pull = jax.vjp(attend, *draw["arrays"])
        return *results, *pull(draw["cotangents"])

    with jax.default_matmul_precision("highest"):
        return jax.jit(run).lower(draw).compile()


def _share_of_allowed(setting, name, actual, expected):
    """Largest error over the one allowed: four roundings to dtype and a float32 sum's."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    finite = np.isfinite(expected)
    if not np.isfinite(actual[finite]).all() or (actual != expected)[~finite].any():
        return float("inf")
    dtype = "float32" if name == "lse" else setting.dtype
    length = max(
        setting.J * setting.key_block, setting.K, setting.T * setting.H // setting.G
    )
    unit = 2 * float(jnp.finfo(dtype).eps)
    unit += length**0.5 * float(jnp.finfo(jnp.float32).eps)
    error = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    magnitude = np.abs(expected[finite]).max(initial=0.0)
    return float(error / (unit * magnitude)) if magnitude else float(error > 0)


def check(implementation, num_draws):
    """A record for each setting: how many draws are out of tolerance, and the worst error.

    Each draw is computed twice; `unequal` counts those whose bits differ.
    """
    settings = [_fit(setting, implementation) for setting in SETTINGS]
    first = [_draw(setting, 0) for setting in settings]
    with futures.ThreadPoolExecutor() as pool:
        compiled = [
            [
                pool.submit(_compile, setting, x, draw)
                for x in (implementation, "reference")
            ]
            for setting, draw in zip(settings, first)
        ]
        for setting, pair in zip(settings, compiled):
            kernel, oracle = (x.result() for x in pair)
            worst, wrong, unequal = dict.fromkeys(NAMES, 0.0), 0, 0
            for seed in range(num_draws):
                draw = _draw(setting, seed)
                actual, again, expected = kernel(draw), kernel(draw), oracle(draw)
                pairs = zip(NAMES, actual, again, expected)
                pairs = [x for x in pairs if x[1] is not None]
                unequal += any(
                    np.asarray(x).tobytes() != np.asarray(y).tobytes()
                    for _, x, y, _ in pairs
                )
                shares = {
                    name: _share_of_allowed(setting, name, x, y)
                    for name, x, _, y in pairs
                }
                wrong += max(shares.values()) > 1
                worst |= {name: max(worst[name], x) for name, x in shares.items()}
            yield {
                "part": "parity",
                "implementation": implementation,
                **dataclasses.asdict(setting),
                "draws": num_draws,
                "out_of_tolerance": wrong,
                "unequal": unequal,
                **{f"share_{name}": round(x, 4) for name, x in worst.items()},
            }
