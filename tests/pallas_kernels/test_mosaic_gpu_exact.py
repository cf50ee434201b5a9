"""A refined function has no tanh, and the values and slopes that it had."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic_gpu_exact

CAP = 30.0
EDGES = jnp.asarray([-jnp.inf, -1e30, -5.0, -1e-3, -0.0, 0.0, 1e-9, 2.0, 88.0, jnp.inf])


def softcap(s, q_id):
    return CAP * jax.jit(jnp.tanh)(s / CAP) + q_id


def slope(s, q_id):
    return jax.jvp(lambda s: softcap(s, q_id), (s,), (jnp.ones_like(s),))


def test_values_and_slopes_stay():
    s = jnp.concatenate([EDGES, jnp.linspace(-200, 200, 1001)])
    for mod in (softcap, slope):
        refined = mosaic_gpu_exact.refine(mod)
        jaxpr = str(jax.make_jaxpr(refined)(s, 3.0))
        assert "tanh" not in jaxpr and "exp" in jaxpr
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=4e-7 * CAP),
            refined(s, 3.0),
            mod(s, 3.0),
        )
    assert jnp.isnan(mosaic_gpu_exact.tanh(jnp.nan))
