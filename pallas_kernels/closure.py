"""Turns the arrays that a `score_mod` or `mask_mod` closes over into arguments.

An implementation with a custom_vjp needs this: a gradient reaches only what is an argument.
"""

import jax
import jax.numpy as jnp


def convert(mod, *examples):
    """Splits a function into one without a closure and the arrays it closed over.

    `jax.closure_convert` does the same for floats alone; an integer tracer that it leaves
    inside (a document id) would leak out of the caller's scan or checkpoint.

    Args:
        mod: function of arrays, returning one array; None passes through.
        *examples: shapes and dtypes of its arguments, which must then be met exactly.
    Returns:
        pure(floats, others, *args), and the pair (floats, others): tuples of equal length,
        floats with None for what is not floating, others with None for what is.
    """
    if mod is None:
        return None, ((), ())
    jaxpr = jax.make_jaxpr(mod)(*examples)

    def pure(floats, others, *args):
        consts = [y if x is None else x for x, y in zip(floats, others)]
        (out,) = jax.core.eval_jaxpr(jaxpr.jaxpr, consts, *args)
        return out

    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in jaxpr.consts]
    floats = tuple(x if f else None for x, f in zip(jaxpr.consts, floating))
    others = tuple(None if f else x for x, f in zip(jaxpr.consts, floating))
    return pure, (floats, others)
