"""Learning: step, loop, checkpoints, evaluation, figures."""
