"""Scripts that measure: each writes `experiments/results/NAME.json`, a figure beside it, and has an entry in LOG.md."""
