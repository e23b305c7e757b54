"""Packs queries by the block they chose, as `expert_mlp` packs tokens by their expert.

Targets are the experts, query rows the tokens, and the choices fill the same `Slots`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from moejax.kernels.expert_mlp.slots import Slots, sort_slots


def pack(targets: Int[Array, "T K"], num_targets: int) -> Slots:
    """The choices sorted by target, and by query within one; J is an empty slot.

    Equal to `sort_slots`. Where a target and a slot fit into one integer that alone is sorted,
    which on CPU takes a sixth of the time.
    """
    num_slots = targets.size
    if (num_targets + 1) * num_slots >= 1 << 31:
        return sort_slots(targets, num_targets)
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    key = jnp.sort(targets.reshape(-1).astype(jnp.int32) * num_slots + slot)
    order = key % num_slots
    bounds = jnp.searchsorted(key, jnp.arange(num_targets + 1, dtype=jnp.int32) * num_slots)
    row = jnp.zeros_like(slot).at[order].set(slot, unique_indices=True)
    return Slots(
        order=order,
        row=row.reshape(targets.shape),
        group_sizes=jnp.diff(bounds).astype(jnp.int32),
    )
