"""A short causal convolution over time, one filter per feature, added to what it is given.

On keys, after Xiao et al., arXiv 2511.11571: `k'_t = k_t + silu(sum_l w_l k_{t-l})`, so that keys
of a block know a little of each other. Its filters are zero at first, which leaves k' = k.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Bool, Float

from moejax.errors import UserError
from moejax.layers import decoding_cache
from moejax.types import Context, at_least_f32


class ShortConvolution(nn.Module):
    """`x_t + silu(sum_{l < width} w_l x_{t-l})` over `[B, S, H, N]`; w `[width, H N]` starts at 0.

    Sums are in at least float32; the result has x's dtype. What lies before the first token of a
    segment counts as 0. Decoding keeps x of every slot in the collection `cache`.

    Attributes:
      width: positions that a result depends on, its own among them; at least 2.
    """

    width: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B S H N"], context: Context) -> Float[Array, "B S H N"]:
        if self.width < 2:
            raise UserError(
                f"key_conv.width={self.width} must be at least 2: the own position and one before; "
                "leave key_conv out for none"
            )
        shape = (self.width, x.shape[2] * x.shape[3])
        zeros = nn.with_logical_partitioning(initializers.zeros, (None, "heads"))
        kernel = self.param("kernel", zeros, shape, jnp.float32).reshape(-1, *x.shape[2:])
        kernel = kernel.astype(at_least_f32(x.dtype))
        slots = self._slots(x, context) if context.decode else None
        total = jnp.zeros((), kernel.dtype)
        for lag in range(self.width):
            if slots is None:
                before, there = _shifted(x, lag, context)
            else:
                before, there = _from_slots(slots, lag, context)
            product = kernel[lag] * before.astype(kernel.dtype)
            total = total + jnp.where(there[..., None, None], product, 0)
        return (x.astype(kernel.dtype) + jax.nn.silu(total)).astype(x.dtype)

    def _slots(self, x: Array, context: Context) -> Array:
        """Every position's x, the new ones among them."""
        shape = (x.shape[0], decoding_cache.num_slots(x.shape[1], context), *x.shape[2:])
        cached = self.variable("cache", "cached_input", jnp.zeros, shape, x.dtype)
        cached.value = decoding_cache.write(cached.value, x, context)
        return cached.value


def _shifted(
    x: Float[Array, "B S H N"], lag: int, context: Context
) -> tuple[Float[Array, "B S H N"], Bool[Array, "B S"]]:
    """What stands `lag` positions before each, and whether it is there, in the same segment."""
    ids, length = jnp.asarray(context.segment_ids), x.shape[1]
    lag = min(lag, length)
    back = lambda y: jnp.pad(y, [(0, 0), (lag, 0)] + [(0, 0)] * (y.ndim - 2))[:, :length]
    real = back(jnp.ones(ids.shape, bool))
    return back(x), real & (back(ids) == ids)


def _from_slots(
    slots: Float[Array, "B M H N"], lag: int, context: Context
) -> tuple[Float[Array, "B S H N"], Bool[Array, "B S"]]:
    """As `_shifted`; a row of slots is one segment."""
    at = jnp.asarray(context.positions) - lag
    index = jnp.clip(at, 0, slots.shape[1] - 1)[..., None, None]
    return jnp.take_along_axis(slots, index, axis=1), at >= 0
