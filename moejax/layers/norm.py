"""Normalisation: root mean square, and around the mean with a bias.

Zhang and Sennrich, arXiv 1910.07467 (`RMSNorm`); Ba et al., arXiv 1607.06450 (`LayerNorm`).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.types import at_least_f32


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last `num_axes` axes together.

    The statistic and the product are computed in at least float32; the result has x's dtype.

    Attributes:
      epsilon: added to the mean square.
      num_axes: 1 normalises each vector; 2 on queries `[B, S, H, N]` normalises over all heads at
        once (OLMoE's QK-norm). The scale is one flat vector either way.
    """

    epsilon: float = 1e-6
    num_axes: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "... N"]) -> Float[Array, "... N"]:
        shape = x.shape[-self.num_axes :]
        axes = tuple(range(-self.num_axes, 0))
        init = nn.with_logical_partitioning(initializers.ones, (None,))
        scale = self.param("scale", init, (math.prod(shape),), jnp.float32).reshape(shape)
        y = x.astype(at_least_f32(x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + self.epsilon)
        return (y * scale.astype(y.dtype)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias` over the last axis.

    Statistics and products are computed in at least float32; the result has x's dtype.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... N"]) -> Float[Array, "... N"]:
        width = x.shape[-1:]
        boxed = lambda init: nn.with_logical_partitioning(init, (None,))
        scale = self.param("scale", boxed(initializers.ones), width, jnp.float32)
        bias = self.param("bias", boxed(initializers.zeros), width, jnp.float32)
        y = x.astype(at_least_f32(x.dtype))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale.astype(y.dtype) + bias.astype(y.dtype)).astype(x.dtype)
