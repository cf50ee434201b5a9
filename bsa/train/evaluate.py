"""Held-out bits per byte by position, and passkeys over length and depth. Called by `loop` and `bsa.main`."""

import json
import pathlib

import jax
import numpy as np
from absl import logging

from bsa.parallel import mesh as meshes
from bsa.tasks import corpus as corpus_lib
from bsa.tasks import pipeline
from bsa.train import figures, settings, step, writer


class Evaluator:
    """Compiled once, called during training and at its end."""

    def __init__(
        self,
        run: settings.RunSettings,
        corpus: corpus_lib.Corpus,
        mesh: jax.sharding.Mesh,
    ):
        self._run, self._corpus, self._mesh = run, corpus, mesh
        self._step = step.make_evaluation_step(run)

    def bits_per_byte(self, params, num_batches: int) -> dict:
        """Bits per byte of held-out text, whole and by position in the document.

        Returns:
            `bits_per_byte`, `bits_per_byte_by_position` (a list of {first, last, bits_per_byte, tokens}; buckets double,
            positions in tokens, both ends included), and the attention's figures.
        """
        edges = position_edges(self._run.data.T, self._run.evaluation.position_buckets)
        nats, tokens = np.zeros(len(edges)), np.zeros(len(edges))
        layers = []
        for batch in pipeline.heldout_batches(
            self._corpus, self._run.data, num_batches
        ):
            nll_BT, _, layer = self._step(
                params, meshes.global_batch(self._mesh, batch)
            )
            nll_BT, weight_BT = np.asarray(nll_BT, np.float64), batch["weight_BT"]
            bucket = np.searchsorted(edges, batch["position_BT"], side="right") - 1
            nats += np.bincount(
                bucket.ravel(), (nll_BT * weight_BT).ravel(), len(edges)
            )
            tokens += np.bincount(bucket.ravel(), weight_BT.ravel(), len(edges))
            layers.append(jax.device_get(layer))
        bits = nats / np.log(2)
        last = [*(edges[1:] - 1), self._run.data.T - 1]
        by_position = [
            {
                "first": int(a),
                "last": int(b),
                "bits_per_byte": float(x / n),
                "tokens": int(n),
            }
            for a, b, x, n in zip(edges, last, bits, tokens)
            if n
        ]
        means = {
            name: float(np.mean([layer[name] for layer in layers]))
            for name in layers[0]
        }
        return {
            "bits_per_byte": float(bits.sum() / tokens.sum()),
            "bits_per_byte_by_position": by_position,
        } | means

    def passkey_accuracy(self, params) -> list[dict]:
        """Share of passkeys whose digits are all the likeliest token, for each length and depth.

        Teacher-forced, which for an exact match is the same as decoding greedily.
        """
        evaluation, cells = self._run.evaluation, []
        depths = (
            np.linspace(0, 1, evaluation.passkey_depths)
            if evaluation.passkey_depths > 1
            else [0.5]
        )
        for num_tokens in evaluation.passkey_tokens:
            for depth in depths:
                batch = pipeline.passkey_batch(
                    self._corpus,
                    self._run.data,
                    num_tokens,
                    float(depth),
                    evaluation.passkey_samples,
                    seed=len(cells),
                )
                _, hit_BT, _ = self._step(
                    params, meshes.global_batch(self._mesh, batch)
                )
                found = (np.asarray(hit_BT) | (batch["weight_BT"] == 0)).all(1)
                cells.append(
                    {
                        "tokens": int(num_tokens),
                        "depth": float(depth),
                        "accuracy": float(found.mean()),
                    }
                )
        return cells

    def evaluate(self, params, workdir: pathlib.Path) -> dict:
        """Everything, written to workdir/evaluation.json and as figures beside it.

        Returns:
            What was written, see `bits_per_byte`; and `passkey_accuracy`, `num_params`.
        """
        run = self._run
        result = self.bits_per_byte(params, run.evaluation.batches)
        result["passkey_accuracy"] = self.passkey_accuracy(params)
        result["num_params"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        (workdir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        folder = workdir / "figures"
        folder.mkdir(exist_ok=True)
        figures.bits_by_position(result, folder / "bits_by_position.png")
        figures.needle_map(result, folder / "passkeys.png")
        if "b" in run.model.pattern:
            figures.selection_picture(
                self._read_blocks(params),
                folder / "selection.png",
                query_block=run.model.index.query_block,
                key_block=run.model.index.C,
                title="Share of tokens that read each block (last bookmark layer)",
            )
        if records := writer.read_metrics(workdir):
            figures.loss_curve(records, folder / "loss.png")
        logging.info(
            "evaluation: %s",
            {k: v for k, v in result.items() if isinstance(v, float | int)},
        )
        return result

    def _read_blocks(self, params):
        """float32 [query blocks, key blocks]: share of a query block's tokens that read each key block, last layer."""
        batch = next(iter(pipeline.heldout_batches(self._corpus, self._run.data, 1)))
        lists = step.make_selection_step(self._run)(
            params, meshes.global_batch(self._mesh, batch)
        )
        lists = jax.device_get(lists[max(lists)])
        block_id_QJ, mask_QJ = (
            lists.block_id_BGQJ[-1, 0, 0],
            lists.token_mask_BGQJ[-1, 0, 0],
        )
        read_QN = np.zeros(
            (block_id_QJ.shape[0], self._run.data.T // lists.key_block), np.float32
        )
        query, entry = np.nonzero(block_id_QJ >= 0)
        read_QN[query, block_id_QJ[query, entry]] = (
            np.bitwise_count(mask_QJ[query, entry]) / lists.query_block
        )
        return read_QN


def position_edges(num_tokens: int, num_buckets: int) -> np.ndarray:
    """First positions of buckets that double in length up to `num_tokens`; fewer buckets if they would be empty."""
    edges = [num_tokens >> k for k in range(1, num_buckets)]
    return np.array([0, *sorted({edge for edge in edges if edge > 0})])
