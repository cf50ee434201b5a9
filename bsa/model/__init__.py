"""The decoder: parameters in a thin linen shell, maths in plain functions."""
