"""Rotary position embedding and the scaling rules of long-context checkpoints.

Su et al., arXiv 2104.09864 (rotation); Meta's Llama 3.1 release (`Llama3Scaling`);
Peng et al., "YaRN", arXiv 2309.00071 (`YarnScaling`); Ding et al., "LongRoPE", arXiv 2402.13753
(`LongRopeScaling`). Feature pairs are (i, i + N/2).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.errors import UserError
from moejax.types import at_least_f32


@runtime_checkable
class Scaling(Protocol):
    """How a checkpoint stretches its context."""

    def frequencies(self, inverse: np.ndarray, *, theta: float, d_rotary: int) -> np.ndarray:
        """The changed inverse frequencies `[d_rotary/2]`, in radians per position."""

    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv 2306.15595): every frequency over `factor`."""

    factor: float

    def frequencies(self, inverse, *, theta, d_rotary):
        """Every inverse frequency over `factor`."""
        return inverse / self.factor

    def amplitude(self) -> float:
        """1: cos and sin stay as they are."""
        return 1.0


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

    def __post_init__(self) -> None:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise UserError(
                f"rope.scaling.high_frequency_factor={self.high_frequency_factor} must be above "
                f"low_frequency_factor={self.low_frequency_factor}"
            )

    def frequencies(self, inverse, *, theta, d_rotary):
        """Interpolated between kept and divided, by full turns over the original context."""
        turns = self.original_context * inverse / (2 * math.pi)
        band = self.high_frequency_factor - self.low_frequency_factor
        keep = np.clip((turns - self.low_frequency_factor) / band, 0.0, 1.0)
        return (1 - keep) * inverse / self.factor + keep * inverse

    def amplitude(self) -> float:
        """1: cos and sin stay as they are."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """NTK-by-parts: a ramp over the feature index between "keep" and "divide by factor".

    Attributes:
      factor: by which the context grows.
      original_context: positions the model was pretrained with.
      beta_fast, beta_slow: features that make more than `beta_fast` turns over the original
        context are kept, those that make fewer than `beta_slow` are divided.
      truncate: round the ramp's ends outwards to whole features, as most checkpoints do;
        gpt-oss does not.
      mscale, mscale_all_dim: DeepSeek's amplitude, `m(mscale) / m(mscale_all_dim)` with
        `m(s) = 0.1 s ln(factor) + 1`; without both it is `m(1)`.
      attention_factor: the amplitude itself, where a checkpoint states it.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    def frequencies(self, inverse, *, theta, d_rotary):
        """The ramp between kept and divided inverse frequencies."""

        def feature(num_turns: float) -> float:  # the feature index that makes num_turns turns
            wave = self.original_context / (num_turns * 2 * math.pi)
            return d_rotary * math.log(wave) / (2 * math.log(theta))

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d_rotary - 1)
        span = (high - low) or 1e-3  # both ends on one feature: a step instead of a ramp
        divide = np.clip((np.arange(d_rotary // 2) - low) / span, 0.0, 1.0)
        return divide * inverse / self.factor + (1 - divide) * inverse

    def magnitude(self, scale: float) -> float:
        """m(scale), by which YaRN keeps the softmax of a longer context as sharp."""
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def amplitude(self) -> float:
        """What cos and sin are multiplied by; its square multiplies the attention logits."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DividedScaling:
    """Every frequency over a factor of its own, and cos and sin times `stretch`."""

    factors: tuple[float, ...]
    stretch: float

    def frequencies(self, inverse, *, theta, d_rotary):
        """Each inverse frequency over its factor."""
        if len(self.factors) != len(inverse):
            raise UserError(
                f"rope.scaling has {len(self.factors)} factors, but {d_rotary} rotated features "
                f"need {len(inverse)}"
            )
        return inverse / np.asarray(self.factors)

    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        return self.stretch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A factor per frequency, by whether rows are longer than those of pretraining (Phi-3.5).

    The rows are what is computed at once, padding and packed sequences included: S positions, or
    the slots of the decoding cache. All of a row is rotated alike, so keys in a cache stay valid,
    and the same sequence has other logits in rows of more than `original_context` positions. The
    model's own code goes by the sequence so far, and computes its cache anew when that is passed.

    Attributes:
      short_factors, long_factors: one for every inverse frequency, for short and for long rows.
      short_amplitude, long_amplitude: what cos and sin are multiplied by.
      original_context: positions of the longest short row.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    short_amplitude: float
    long_amplitude: float
    original_context: int

    def at(self, length: int) -> Scaling:
        """The rule for rows of `length` positions."""
        if length > self.original_context:
            return DividedScaling(factors=self.long_factors, stretch=self.long_amplitude)
        return DividedScaling(factors=self.short_factors, stretch=self.short_amplitude)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotates the first `fraction` of the head's features by angles `position * frequency`."""

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | LongRopeScaling | None = None

    def at(self, length: int) -> Rope:
        """The embedding of rows of `length` positions: itself, unless the scaling depends on it."""
        if isinstance(self.scaling, LongRopeScaling):
            return dataclasses.replace(self, scaling=self.scaling.at(length))
        return self

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Inverse frequencies `[rotary/2]` in radians per position, float64."""
        d_rotary = int(head_dim * self.fraction)
        if not 0 < d_rotary <= head_dim or d_rotary % 2:
            raise UserError(
                f"rope.fraction={self.fraction} of a head of {head_dim} features rotates "
                f"{d_rotary} of them: it must be an even number from 2 to {head_dim}"
            )
        inverse = self.theta ** -(np.arange(0, d_rotary, 2, dtype=np.float64) / d_rotary)
        if self.scaling is None:
            return inverse
        return self.scaling.frequencies(inverse, theta=self.theta, d_rotary=d_rotary)

    def __call__(
        self, x: Float[Array, "B S H N"], positions: Int[Array, "B S"], length: int | None = None
    ) -> Float[Array, "B S H N"]:
        """Angles and products in at least float32; the result has x's dtype.

        `length` is how many positions a row may have, where that is not S: when decoding.
        """
        rope = self.at(x.shape[1] if length is None else length)
        inverse = rope.frequencies(x.shape[-1])
        amplitude = 1.0 if rope.scaling is None else rope.scaling.amplitude()
        dtype = at_least_f32(x.dtype)
        angles = positions[..., None, None].astype(dtype) * jnp.asarray(inverse, dtype)
        cos, sin = amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)
        # Behind the barrier [B, S, 1, rotary/2] is computed once, and not again for every head.
        cos, sin = jax.lax.optimization_barrier((cos, sin))
        half = inverse.shape[0]
        a, b = x[..., :half].astype(dtype), x[..., half : 2 * half].astype(dtype)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)
