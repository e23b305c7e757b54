"""Which rows belong to the groups that `rhs` holds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalGroups:
    """The groups of `rhs`: their sizes and the row where the first one starts."""

    sizes: Int[Array, "G"]
    first_row: Int[Array, ""]

    def holds(self, num_rows: int) -> Bool[Array, "R"]:
        """Which rows belong to any of these groups."""
        row = jnp.arange(num_rows, dtype=jnp.int32)
        return (row >= self.first_row) & (row < self.first_row + jnp.sum(self.sizes))


def local_groups(
    group_sizes: Int[Array, "all"], group_offset: Int[Array, ""] | None, num_groups: int
) -> LocalGroups:
    """Sizes and first row of groups `group_offset ... group_offset + num_groups - 1`.

    A group beyond the end of `group_sizes` is empty.
    """
    sizes = group_sizes.astype(jnp.int32)
    if group_offset is None:
        return LocalGroups(sizes, jnp.zeros((), jnp.int32))
    offset = jnp.asarray(group_offset, jnp.int32).reshape(())
    index = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    first_row = jnp.sum(jnp.where(index < offset, sizes, 0))
    wanted = offset + jnp.arange(num_groups, dtype=jnp.int32)
    return LocalGroups(sizes.at[wanted].get(mode="fill", fill_value=0), first_row)
