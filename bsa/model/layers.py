"""Parameters of the decoder in thin linen modules; the maths is in `attention`, `rope` and the functions below."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bsa.index import turn
from bsa.model import attention, rope, settings, temperature
from bsa.parallel import mesh, pieces

INITIAL_STD = 0.02

LAYER_INPUT = "layer_input"
"""Name under which a layer's input may wait for backward in the host's memory."""


class Norm(nn.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019), in float32."""

    epsilon: float
    name_of_scale: str = "scale_D"

    @nn.compact
    def __call__(self, x):
        scale = self.param(self.name_of_scale, nn.initializers.ones, x.shape[-1:])
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * scale).astype(x.dtype)


class Attention(nn.Module):
    """Projections of one attention layer around `attend`, which has the signature of `attention.attend`."""

    model: settings.ModelSettings
    layer: int
    attend: Callable = attention.attend

    @nn.compact
    def __call__(self, x_BTD, segment_id_BT, position_BT, followed=None):
        m = self.model
        init = nn.initializers.normal(INITIAL_STD)
        q_BTHK = _project(
            "BTD,DHK->BTHK", x_BTD, self.param("query_DHK", init, (m.D, m.H, m.K))
        )
        k_BSGK = _project(
            "BTD,DGK->BTGK", x_BTD, self.param("key_DGK", init, (m.D, m.G, m.K))
        )
        v_BSGK = _project(
            "BTD,DGK->BTGK", x_BTD, self.param("value_DGK", init, (m.D, m.G, m.K))
        )
        if m.qkv_bias:
            zeros = nn.initializers.zeros
            q_BTHK += self.param("query_HK", zeros, (m.H, m.K)).astype(x_BTD.dtype)
            k_BSGK += self.param("key_GK", zeros, (m.G, m.K)).astype(x_BTD.dtype)
            v_BSGK += self.param("value_GK", zeros, (m.G, m.K)).astype(x_BTD.dtype)
        if m.qk_norm:
            q_BTHK = Norm(m.norm_eps, "scale_K", name="query_norm")(q_BTHK)
            k_BSGK = Norm(m.norm_eps, "scale_K", name="key_norm")(k_BSGK)
        unturned = q_BTHK, k_BSGK
        if m.positions[self.layer] == "r":
            q_BTHK = rope.rotate(q_BTHK, position_BT, m.rope_theta, m.rope_scaling)
            k_BSGK = rope.rotate(k_BSGK, position_BT, m.rope_theta, m.rope_scaling)
        sharpness_BT = temperature.sharpness(position_BT, m, self.layer)
        q_BTHK = temperature.sharpen(q_BTHK, sharpness_BT)
        self.sow("intermediates", "query", q_BTHK)
        self.sow("intermediates", "key", k_BSGK)
        heads = attention.Heads(
            *(q_BTHK, k_BSGK, v_BSGK, (q_BTHK, k_BSGK)), sharpness_BT=sharpness_BT
        )
        if m.pattern[self.layer] == "b":
            heads = self._with_choosing(heads, unturned, x_BTD)
        out_BTHK, figures = self.attend(
            heads, segment_id_BT, position_BT, m, self.layer, followed
        )
        out_init = nn.initializers.normal(INITIAL_STD / (2 * m.L) ** 0.5)
        out_HKD = self.param("out_HKD", out_init, (m.H, m.K, m.D))
        return _project("BTHK,HKD->BTD", out_BTHK, out_HKD), figures

    def _with_choosing(self, heads, unturned, x_BTD):
        """What a bookmark layer has beside queries, keys and values, as far as it is asked for."""
        m, (B, T, _) = self.model, x_BTD.shape
        if m.route_before_rope:
            heads = heads._replace(sought=unturned)
        if m.route_width:
            heads = heads._replace(sought=self._sought(jax.lax.stop_gradient(x_BTD)))
        if m.route_taps:
            sizes = m.route_taps, m.G, m.route_width
            init = nn.initializers.normal(INITIAL_STD)
            filter_CGK = self.param("route_filter_CGK", init, sizes)
            heads = heads._replace(filter_CGK=filter_CGK)
        if m.index.spans == "learned":
            heads = heads._replace(boundary=self._boundary())
        if m.ask_again:
            init = nn.initializers.normal(INITIAL_STD)
            again_HKK = self.param("again_HKK", init, (m.H, m.K, m.K))
            heads = heads._replace(again_HKK=again_HKK.astype(x_BTD.dtype))
        if m.branch_gates:
            heads = heads._replace(gates=self._gates(x_BTD))
        if m.score_noise and self.has_rng("noise"):
            seed_BGT = jax.random.bits(self.make_rng("noise"), (B, m.G, T))
            heads = heads._replace(noise=(seed_BGT, m.score_noise))
        return heads

    def _sought(self, x_BTD):
        """The index's own queries and keys, without positions; a query for each key/value head."""
        m = self.model
        init = nn.initializers.normal(INITIAL_STD)
        return tuple(
            Norm(m.norm_eps, "scale_K", name=f"{name}_norm")(
                _project(
                    "BTD,DGK->BTGK",
                    x_BTD,
                    self.param(f"{name}_DGK", init, (m.D, m.G, m.route_width)),
                )
            )
            for name in ("route_query", "route_key")
        )

    def _boundary(self):
        """What finds learned spans: at first the keys themselves (H-Net)."""
        m = self.model
        width = m.route_width or m.K

        def identity(_, shape):
            return jnp.broadcast_to(jnp.eye(width), shape)

        shape = m.G, width, width
        return turn.Boundary(
            self.param("span_before_GKK", identity, shape),
            self.param("span_after_GKK", identity, shape),
        )

    def _gates(self, x_BTD):
        """How much of each head's branches is read, see `attention.Heads`."""
        m = self.model
        init = nn.initializers.normal(INITIAL_STD)
        return tuple(
            jax.nn.sigmoid(
                _project(
                    "BTD,DH->BTH", x_BTD, self.param(f"{name}_DH", init, (m.D, m.H))
                )
            )
            for name in ("means_gate", "chosen_gate", "local_gate")
        )


class Mlp(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    model: settings.ModelSettings
    placement: mesh.Placement = mesh.ALONE

    @nn.compact
    def __call__(self, x_BTD):
        m = self.model
        init = nn.initializers.normal(INITIAL_STD)
        gate_DF = self.param("gate_DF", init, (m.D, m.F))
        up_DF = self.param("up_DF", init, (m.D, m.F))
        down_init = nn.initializers.normal(INITIAL_STD / (2 * m.L) ** 0.5)
        down_FD = self.param("down_FD", down_init, (m.F, m.D))

        def of_tokens(x):
            gate, up = (_project("...d,df->...f", x, w) for w in (gate_DF, up_DF))
            return _project("...f,fd->...d", jax.nn.silu(gate) * up, down_FD)

        if not m.mlp_tokens:
            return of_tokens(x_BTD)
        return pieces.map_tokens(of_tokens, (x_BTD,), m.mlp_tokens, self.placement)


class Layer(nn.Module):
    """One pre-norm decoder layer: attention, then MLP."""

    model: settings.ModelSettings
    layer: int
    attend: Callable = attention.attend
    placement: mesh.Placement = mesh.ALONE

    @nn.compact
    def __call__(self, x_BTD, segment_id_BT, position_BT, followed=None):
        m = self.model
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        normed = Norm(m.norm_eps, name="attention_norm")(x_BTD)
        out, figures = Attention(m, self.layer, self.attend, name="attention")(
            normed, segment_id_BT, position_BT, followed
        )
        x_BTD += out
        normed = Norm(m.norm_eps, name="mlp_norm")(x_BTD)
        return x_BTD + Mlp(m, self.placement, name="mlp")(normed), figures


def _project(equation, x, weight):
    """An einsum in the activations' dtype; parameters are float32."""
    return jnp.einsum(equation, x, weight.astype(x.dtype))
