"""Which rows belong to the groups that `rhs` holds."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class LocalGroups:
    """The groups of `rhs`: their sizes and the row where the first one starts.

    `first_row` is the Python number 0 where `rhs` holds all groups, so that nothing is moved then.
    """

    sizes: Int[Array, " G"]
    first_row: Int[Array, ""] | int


def local_groups(
    group_sizes: Int[Array, " all"], group_offset: Int[Array, ""] | None, num_groups: int
) -> LocalGroups:
    """Sizes and first row of groups `group_offset ... group_offset + num_groups - 1`.

    A group beyond the end of `group_sizes` is empty.
    """
    sizes = group_sizes.astype(jnp.int32)
    if group_offset is None:
        return LocalGroups(sizes, 0)
    offset = jnp.asarray(group_offset, jnp.int32).reshape(())
    index = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    first_row = jnp.sum(jnp.where(index < offset, sizes, 0))
    wanted = offset + jnp.arange(num_groups, dtype=jnp.int32)
    return LocalGroups(sizes.at[wanted].get(mode="fill", fill_value=0), first_row)
