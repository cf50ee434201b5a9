"""Rotary position embedding (Su et al., 2021) and what stretches it to longer texts. Called by `layers`.

Every way to stretch is a table of frequencies, made when the program is traced, and an amplitude. None depends on the
tokens that happen to follow: those that go by the text's length are told it beforehand.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels import shapes

KINDS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How frequencies are stretched; `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: the kind is unknown, or lacks what it goes by.
    """

    kind: str
    factor: float
    trained_tokens: int
    tokens: int
    amplitude: float
    fast_turns: float
    slow_turns: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"rope_scaling: kind={self.kind!r} is not one of {', '.join(KINDS)}"
            )
        if self.factor < 1:
            raise ValueError(
                f"rope_scaling: factor={self.factor} must be at least 1: it says how many times longer texts may be"
            )
        goes_by_length = self.kind in ("dynamic", "yarn", "llama3", "longrope")
        if goes_by_length and self.trained_tokens < 1:
            raise ValueError(
                f"rope_scaling: kind={self.kind!r} goes by trained_tokens={self.trained_tokens}; say how long texts were"
            )
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise ValueError(
                "rope_scaling: kind='longrope' needs short_factors and long_factors, one for each pair"
            )
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(
                f"rope_scaling: slow_turns={self.slow_turns} must lie between 0 and fast_turns={self.fast_turns}"
            )


UNSCALED = Scaling("none", 1.0, 0, 0, 0.0, 32.0, 1.0, (), ())


def rotate(x_BTHK, position_BT, theta: float, scaling: Scaling = UNSCALED):
    """Turns the pair (i, i + K/2) of every head by position * frequency[i] radians; computed in float32.

    Args:
        position_BT: int32; only differences matter to attention.
        theta: base of the wavelengths: unscaled, frequency[i] is theta**(-2i/K).
    """
    sizes = shapes.check(x_BTHK=x_BTHK, position_BT=position_BT)
    frequency = frequencies(sizes["K"], theta, scaling)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    height = amplitude(scaling)
    cos, sin = jnp.cos(angle) * height, jnp.sin(angle) * height
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x_BTHK.dtype)


def frequencies(width: int, theta: float, scaling: Scaling):
    """The table of one head: what each pair turns by a token.

    `linear` is position interpolation (arXiv 2306.15595); `ntk` raises theta so that the slowest pair turns `factor`
    times slower, `dynamic` does so by the text's length; `yarn` (2309.00071) and `llama3` (2407.21783) stretch slow
    pairs only; `longrope` (2402.13753) has a factor for each pair, one set for short texts and one for long ones.

    Args:
        width: K.
    Returns:
        float32[K/2], radians a token.
    Raises:
        ValueError: longrope's factors are not one for each pair.
    """
    s, half = scaling, width // 2
    exponent = np.arange(half, dtype=np.float64) / half
    growth = 1.0
    if s.kind == "ntk":
        growth = s.factor
    elif s.kind == "dynamic":
        growth = s.factor * max(s.tokens, s.trained_tokens) / s.trained_tokens
        growth -= s.factor - 1
    frequency = (theta * growth ** (width / max(width - 2, 1))) ** -exponent
    if s.kind == "linear":
        frequency /= s.factor
    elif s.kind == "yarn":
        keep = _kept_by_yarn(half, theta, s)
        frequency *= keep + (1 - keep) / s.factor
    elif s.kind == "llama3":
        turns = s.trained_tokens * frequency / (2 * np.pi)
        keep = (turns - s.slow_turns) / (s.fast_turns - s.slow_turns)
        keep = np.clip(keep, 0, 1)
        frequency *= keep + (1 - keep) / s.factor
    elif s.kind == "longrope":
        is_long = s.tokens > s.trained_tokens
        factors = s.long_factors if is_long else s.short_factors
        if len(factors) != half:
            raise ValueError(
                f"rope_scaling: {len(factors)} factors for the {half} pairs of heads of K={width}"
            )
        frequency /= np.asarray(factors)
    return frequency.astype(np.float32)


def _kept_by_yarn(half, theta, scaling):
    """Share of each pair's frequency that stays as it was: a ramp over pairs, between two numbers of turns."""

    def pair(turns):
        wavelengths = scaling.trained_tokens / (turns * 2 * math.pi)
        return half * math.log(wavelengths) / math.log(theta)

    first = max(math.floor(pair(scaling.fast_turns)), 0)
    last = min(math.ceil(pair(scaling.slow_turns)), 2 * half - 1)
    ramp = (np.arange(half) - first) / max(last - first, 1e-3)
    return 1 - np.clip(ramp, 0, 1)


def amplitude(scaling: Scaling) -> float:
    """What cosines and sines are multiplied with: as told, or what the kind's authors chose."""
    if scaling.amplitude:
        return scaling.amplitude
    if scaling.kind == "yarn":
        return yarn_amplitude(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(
            1 + math.log(scaling.factor) / math.log(scaling.trained_tokens)
        )
    return 1.0


def yarn_amplitude(factor: float) -> float:
    """YaRN's amplitude for texts `factor` times longer."""
    return 0.1 * math.log(factor) + 1
