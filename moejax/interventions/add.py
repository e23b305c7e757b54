"""Adds numbers to router logits: for all tokens, per sequence or per token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.types import AnyArray, Context, pytree


@pytree
class Add:
    """logits + delta.

    Attributes:
      delta: whatever broadcasts to `[B, S, E]` within a layer: `[E]`, `[B, 1, E]`, `[B, S, E]`.
        The same number for all experts of a token changes nothing under a softmax.
    """

    delta: Float[AnyArray, "..."]

    def __call__(self, logits: Float[Array, "T E"], context: Context) -> Float[Array, "T E"]:
        shape = (*context.token_mask.shape, logits.shape[-1])
        return logits + jnp.broadcast_to(self.delta, shape).reshape(logits.shape)


def example() -> Add:
    """A small instance."""
    return Add(delta=jnp.zeros(()))
