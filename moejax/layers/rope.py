"""Rotary position embedding and the scaling rules of long-context checkpoints.

Su et al., arXiv 2104.09864 (rotation); Meta's Llama 3.1 release (`Llama3Scaling`);
Peng et al., "YaRN", arXiv 2309.00071 (`YarnScaling`). Feature pairs are (i, i + N/2).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.types import at_least_f32


class Scaling(Protocol):
    """Changes the inverse frequencies `[N/2]`; `attention_factor` multiplies cos and sin."""

    def frequencies(self, inverse: np.ndarray, *, theta: float, d_rotary: int) -> np.ndarray: ...

    @property
    def attention_factor(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv 2306.15595): every frequency over `factor`."""

    factor: float

    attention_factor = 1.0

    def frequencies(self, inverse, *, theta, d_rotary):
        return inverse / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long waves are divided by `factor`, short waves kept, and the band between interpolated.

    Wavelength limits are `original_context / low_frequency_factor` (above: scaled) and
    `original_context / high_frequency_factor` (below: kept).
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    attention_factor = 1.0

    def frequencies(self, inverse, *, theta, d_rotary):
        turns = self.original_context * inverse / (2 * math.pi)  # full turns over the old context
        band = self.high_frequency_factor - self.low_frequency_factor
        keep = np.clip((turns - self.low_frequency_factor) / band, 0.0, 1.0)
        return (1 - keep) * inverse / self.factor + keep * inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """NTK-by-parts: a ramp over feature index between "keep" and "divide by factor".

    `truncate` rounds the ramp's ends to whole features as most checkpoints do; gpt-oss does not
    (`truncate=False`). `mscale` and `mscale_all_dim` are DeepSeek's variant of the attention
    factor; both unset means `0.1 ln(factor) + 1`.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def frequencies(self, inverse, *, theta, d_rotary):
        def feature(num_turns: float) -> float:  # feature index that makes num_turns turns
            wave = self.original_context / (num_turns * 2 * math.pi)
            return d_rotary * math.log(wave) / (2 * math.log(theta))

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d_rotary - 1)
        span = max(high - low, 1e-3)
        divide = np.clip((np.arange(d_rotary // 2) - low) / span, 0.0, 1.0)
        return divide * inverse / self.factor + (1 - divide) * inverse

    @property
    def attention_factor(self) -> float:
        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotates the first `fraction` of the head's features by angles `position * frequency`."""

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Inverse frequencies `[rotary/2]` in float64 and the factor on cos and sin."""
        d_rotary = int(head_dim * self.fraction)
        if d_rotary % 2:
            raise ValueError(f"rope.fraction={self.fraction} of head_dim={head_dim} is odd")
        inverse = self.theta ** -(np.arange(0, d_rotary, 2, dtype=np.float64) / d_rotary)
        if self.scaling is None:
            return inverse, 1.0
        scaled = self.scaling.frequencies(inverse, theta=self.theta, d_rotary=d_rotary)
        return scaled, self.scaling.attention_factor

    def __call__(
        self, x: Float[Array, "B S H N"], positions: Int[Array, "B S"]
    ) -> Float[Array, "B S H N"]:
        """Angles and products in at least float32; the result has x's dtype."""
        inverse, factor = self.frequencies(x.shape[-1])
        dtype = at_least_f32(x.dtype)
        angles = positions[..., None, None].astype(dtype) * jnp.asarray(inverse, dtype)
        cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)  # [B, S, 1, rotary/2]
        half = inverse.shape[0]
        a, b = x[..., :half].astype(dtype), x[..., half : 2 * half].astype(dtype)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)
