"""Texts and synthetic tasks, as batches of tokens."""
