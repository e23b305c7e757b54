"""The decoding cache of attention: one slot per position, so a row of the batch is one sequence.

What a slot holds is the method's own; where it is written and who may see it is the same for all.
That a row is one sequence whose slots are written in order is for the model to see to
(`models/decoding.py`): a layer that is called alone does not know what was written before.
"""

from __future__ import annotations

import flax.linen as nn
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
    """`cached` with the new positions in their slots. Padding is dropped.

    Raises UserError where the cache was made for other slots or rows than these: its keys would
    be taken for those of other positions, or dropped.
    """
    if cached.shape[:2] != (made := (new.shape[0], context.cache_length)):
        raise UserError(
            f"the cache has {cached.shape[0]} rows of {cached.shape[1]} slots, and the call is for "
            f"{made[0]} rows with cache_length={made[1]}: decode with the cache_length and the "
            "batch that the cache was made with"
        )
    # Padding is sent to a slot that does not exist; a position below 0 would count from the end.
    there = context.token_mask & (jnp.asarray(context.positions) >= 0)
    slots = jnp.where(there, context.positions, context.cache_length)
    rows = jnp.arange(cached.shape[0])[:, None]
    return cached.at[rows, slots].set(new, mode="drop")


def keys_and_values(
    module: nn.Module, k: Float[Array, "B S G N"], v: Float[Array, "B S G Nv"], context: Context
) -> tuple[Float[Array, "B M G N"], Float[Array, "B M G Nv"]]:
    """Every slot's key and value, the new ones among them; kept as the module's variables."""
    slots = num_slots(k.shape[1], context)
    shape = lambda new: (new.shape[0], slots, *new.shape[2:])
    keys = module.variable("cache", "cached_key", jnp.zeros, shape(k), k.dtype)
    values = module.variable("cache", "cached_value", jnp.zeros, shape(v), v.dtype)
    keys.value = write(keys.value, k, context)
    values.value = write(values.value, v, context)
    return keys.value, values.value


def visible(context: Context) -> Bool[Array, "B S M"]:
    """Which slots a query sees: up to its own, and within the window."""
    distance = context.positions[:, :, None] - jnp.arange(context.cache_length)
    allowed = distance >= 0
    return allowed if context.window is None else allowed & (distance < context.window)


def where_slots_are(out: Float[Array, "B S H N"], context: Context) -> Float[Array, "B S H N"]:
    """NaN for a position without a slot, rather than an answer that forgets."""
    positions = jnp.asarray(context.positions)
    there = (positions >= 0) & (positions < context.cache_length)
    return jnp.where(there[..., None, None], out, jnp.nan)
