"""Held-out bits per byte by position, and passkeys over length and depth. Called by `loop` and `bsa.main`."""

import json
import pathlib

import jax
import numpy as np
from absl import logging

from bsa.parallel import mesh as meshes
from bsa.tasks import corpus as corpus_lib
from bsa.tasks import pipeline
from bsa.train import figures, provenance, settings, step, writer

MAX_PICTURE = 1024
"""Blocks along a side of the picture of a selection; those of longer texts share an element."""


class Evaluator:
    """Compiled once, called during training and at its end."""

    def __init__(
        self,
        run: settings.RunSettings,
        corpus: corpus_lib.Corpus,
        mesh: jax.sharding.Mesh,
    ):
        self._run, self._corpus, self._mesh = run, corpus, mesh
        self._starts = bucket_starts(run.data.T, run.evaluation.position_buckets)
        self._step = step.make_evaluation_step(run, mesh, self._starts)

    def bits_per_byte(self, params, num_batches: int) -> dict:
        """Bits per byte of held-out text, whole and by position in the document.

        Returns:
            `bits_per_byte`, `bits_per_byte_by_position` (a list of {first, last, bits_per_byte, tokens}: positions in
            tokens, both ends included), and the attention layers' figures.
        """
        sums = [
            self._sums(params, batch) for batch in self._heldout_batches(num_batches)
        ]
        nats = np.sum([s.pop("nats") for s in sums], axis=0, dtype=np.float64)
        tokens = np.sum([s.pop("tokens") for s in sums], axis=0, dtype=np.float64)
        ends = [*self._starts[1:], self._run.data.T]
        by_position = [
            {
                "first": first,
                "last": end - 1,
                "bits_per_byte": float(nat / token / np.log(2)),
                "tokens": int(token),
            }
            for first, end, nat, token in zip(self._starts, ends, nats, tokens)
            if token
        ]
        figures_mean = {
            name: float(np.mean([s[name] for s in sums]))
            for name in sums[0]
            if name != "found"
        }
        bits = float(nats.sum() / tokens.sum() / np.log(2))
        return {
            "bits_per_byte": bits,
            "bits_per_byte_by_position": by_position,
        } | figures_mean

    def passkey_accuracy(self, params) -> list[dict]:
        """Share of passkeys whose digits are all the likeliest token, for each length and depth.

        Teacher-forced, which for an exact match is the same as decoding greedily. All depths of a length hide the same
        keys in the same text.

        Returns:
            A list of {tokens, depth, accuracy, samples}.
        """
        evaluation, cells = self._run.evaluation, []
        depths = np.linspace(0, 1, evaluation.passkey_depths)
        for seed, num_tokens in enumerate(evaluation.passkey_tokens):
            for depth in depths.tolist():
                batch = pipeline.passkey_batch(
                    self._corpus,
                    self._run.data,
                    num_tokens,
                    depth,
                    evaluation.passkey_samples,
                    seed,
                )
                batch = _pad(batch, self._run.data.T)
                cells.append(
                    {
                        "tokens": num_tokens,
                        "depth": depth,
                        "accuracy": float(self._sums(params, batch)["found"]),
                        "samples": evaluation.passkey_samples,
                    }
                )
        return cells

    def evaluate(self, params, workdir: pathlib.Path) -> dict:
        """Everything, written to workdir/evaluation.json and as figures beside it.

        Returns:
            What was written, see `bits_per_byte`; and `passkey_accuracy`, `num_params`, `provenance`.
        """
        run = self._run
        result = self.bits_per_byte(params, run.evaluation.batches)
        result["passkey_accuracy"] = self.passkey_accuracy(params)
        result["num_params"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        result["provenance"] = provenance.provenance()
        (workdir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        folder = workdir / "figures"
        folder.mkdir(exist_ok=True)
        figures.bits_by_position(result, folder / "bits_by_position.png")
        figures.needle_map(result, folder / "passkeys.png")
        if "b" in run.model.pattern:
            read_QN, side = self._read_blocks(params)
            figures.selection_picture(
                read_QN,
                folder / "selection.png",
                query_block=run.model.index.query_block * side,
                key_block=run.model.index.C * side,
                title="Share of tokens that read each block (last bookmark layer)",
            )
        if records := writer.read_metrics(workdir):
            figures.loss_curve(records, folder / "loss.png")
        logging.info(
            "evaluation: %s",
            {k: v for k, v in result.items() if isinstance(v, float | int)},
        )
        return result

    def _sums(self, params, batch):
        return jax.device_get(
            self._step(params, meshes.global_batch(self._mesh, batch))
        )

    def _heldout_batches(self, num_batches):
        return pipeline.heldout_batches(self._corpus, self._run.data, num_batches)

    def _read_blocks(self, params):
        """Share of a query block's tokens that read each block, last layer; of long texts means over squares of blocks.

        Returns:
            float32 [query blocks, key blocks], and how many blocks one element stands for on each side.
        """
        batch = next(iter(self._heldout_batches(1)))
        lists = step.make_selection_step(self._run, self._mesh)(
            params, meshes.global_batch(self._mesh, batch)
        )
        lists = jax.device_get(lists[max(lists)])
        block_id_QJ = lists.block_id_BGQJ[-1, 0, 0]
        mask_QJ = lists.token_mask_BGQJ[-1, 0, 0]
        num_blocks = self._run.data.T // lists.key_block
        side = -(-max(num_blocks, len(block_id_QJ)) // MAX_PICTURE)
        shape = [-(-num // side) for num in (len(block_id_QJ), num_blocks)]
        read_QN = np.zeros(shape, np.float32)
        query, entry = np.nonzero(block_id_QJ >= 0)
        share = np.bitwise_count(mask_QJ[query, entry]) / (lists.query_block * side**2)
        np.add.at(read_QN, (query // side, block_id_QJ[query, entry] // side), share)
        return read_QN, side


def _pad(batch, num_tokens):
    """Lengthens shorter rows by padding, so that all lengths share a compiled step."""
    return {
        name: np.pad(rows, ((0, 0), (0, max(0, num_tokens - rows.shape[1]))))
        for name, rows in batch.items()
    }


def bucket_starts(num_tokens: int, num_buckets: int) -> tuple[int, ...]:
    """First positions of buckets of which each is as long as all before it; fewer where they would be empty."""
    starts = {num_tokens >> k for k in range(1, num_buckets)}
    return (0, *sorted(starts - {0}))
