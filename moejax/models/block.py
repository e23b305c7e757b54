"""One pre-norm transformer layer: attention, then a dense or an MoE feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.layers.norm import RMSNorm
from moejax.models.moe import MoE
from moejax.parallel.sharding import constrain
from moejax.types import Context, Stats, Terms


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    Padding is selected to zero first, so that whatever it held, NaN included, reaches neither a
    result nor a gradient. Attention and ffn need not think of it again.

    Attributes:
      attention: `(x [B, S, D], context) -> [B, S, D]`.
      ffn: an `MoE`, or a dense MLP `(x, context) -> y`.
      norm: prototype of the two norms.
    """

    attention: nn.Module
    ffn: nn.Module
    norm: nn.Module = dataclasses.field(default_factory=RMSNorm)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], context: Context
    ) -> tuple[Float[Array, "B S D"], Terms, Stats, Any]:
        """Returns (x, terms, stats, router carry); the last three are empty for a dense layer."""
        x = constrain(jnp.where(context.token_mask[..., None], x, 0), "batch", "sequence", None)
        x = x + self.attention(self.norm.copy(name="attention_norm")(x), context)
        normed = self.norm.copy(name="ffn_norm")(x)
        if isinstance(self.ffn, MoE):
            y, terms, stats, carry = self.ffn(normed, context)
        else:
            y, terms, stats, carry = self.ffn(normed, context), {}, {}, context.router_carry
        return x + y, terms, stats, carry
