"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.types import at_least_f32


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis.

    The statistic and the product are computed in at least float32; the result has x's dtype.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... N"]) -> Float[Array, "... N"]:
        init = nn.with_logical_partitioning(initializers.ones, (None,))
        scale = self.param("scale", init, (x.shape[-1],))
        y = x.astype(at_least_f32(x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale.astype(y.dtype)).astype(x.dtype)
