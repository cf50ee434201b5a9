"""Batches whose rows grow during a run: one pipeline after another, as one resumable iterator. Called by `bsa/train`."""

from bsa.tasks import corpus as corpus_lib
from bsa.tasks import pipeline
from bsa.tasks import settings as settings_lib


class Batches:
    """An iterator over the training batches of all stages, the last of which has no end.

    Each stage reads the corpus cut to its own rows, in an order of its own. The state (`get_state`, `set_state`, JSON)
    names the exact next batch, whichever stage it is of. Close it in a `finally`, like the pipeline's own.
    """

    def __init__(self, corpus: corpus_lib.Corpus, settings: settings_lib.DataSettings):
        self._corpus, self._stages = corpus, settings_lib.stages(settings)
        self._begin(0)

    def __iter__(self):
        return self

    def __next__(self):
        if self._done == self._stages[self._stage][0]:
            self.close()
            self._begin(self._stage + 1)
        self._done += 1
        return next(self._batches)

    def get_state(self) -> dict:
        """Where it is."""
        return {
            "stage": self._stage,
            "done": self._done,
            "batches": self._batches.get_state(),
        }

    def set_state(self, state: dict) -> None:
        """Goes back to where it was."""
        self.close()
        self._begin(state["stage"])
        self._done = state["done"]
        self._batches.set_state(state["batches"])

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()

    def _begin(self, stage):
        _, settings = self._stages[stage]
        self._stage, self._done = stage, 0
        self._batches = iter(pipeline.train_batches(self._corpus, settings))
