"""The decoding cache of attention: one slot per position, so a row of the batch is one sequence.

What a slot holds is the method's own; where it is written and who may see it is the same for all.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.errors import UserError
from moejax.types import Context


def num_slots(length: int, context: Context) -> int:
    """Slots M of the cache; UserError where `length` new positions do not fit."""
    if context.cache_length is None:
        raise ValueError("decoding needs context.cache_length, the number of cache slots")
    if length > context.cache_length:
        raise UserError(
            f"{length} positions do not fit into a cache of {context.cache_length} slots; "
            "give a larger cache_length"
        )
    return context.cache_length


def write(
    cached: Float[Array, "B M *slot"], new: Float[Array, "B S *slot"], context: Context
) -> Float[Array, "B M *slot"]:
    """`cached` with the new positions in their slots. Padding is dropped."""
    # Padding is sent to a slot that does not exist.
    slots = jnp.where(context.token_mask, context.positions, context.cache_length)
    rows = jnp.arange(cached.shape[0])[:, None]
    return cached.at[rows, slots].set(new, mode="drop")


def visible(context: Context) -> Bool[Array, "B S M"]:
    """Which slots a query sees: up to its own, and within the window."""
    distance = context.positions[:, :, None] - jnp.arange(context.cache_length)
    allowed = distance >= 0
    return allowed if context.window is None else allowed & (distance < context.window)


def where_slots_are(out: Float[Array, "B S H N"], context: Context) -> Float[Array, "B S H N"]:
    """NaN for a position without a slot, rather than an answer that forgets."""
    return jnp.where(context.positions[..., None, None] < context.cache_length, out, jnp.nan)
