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

    def of_rows(self, values: Array, num_rows: int) -> Array:
        """`values` `[G, ...]` of each row's group, `[num_rows, ...]`; 0 in rows of no group."""
        ends = self.first_row + jnp.cumsum(self.sizes)
        row = jnp.arange(num_rows, dtype=jnp.int32)
        group = jnp.searchsorted(ends, row, side="right")
        held = (row >= self.first_row) & (row < ends[-1])
        found = values.at[jnp.minimum(group, values.shape[0] - 1)].get(mode="promise_in_bounds")
        return jnp.where(held.reshape(-1, *(1,) * (values.ndim - 1)), found, 0)


def local_groups(
    group_sizes: Int[Array, " all"], group_offset: Int[Array, ""] | None, num_groups: int
) -> LocalGroups:
    """Sizes and first row of groups `group_offset ... group_offset + num_groups - 1`.

    A group before the first or beyond the last of `group_sizes` is empty.
    """
    sizes = group_sizes.astype(jnp.int32)
    if group_offset is None:
        return LocalGroups(sizes, 0)
    offset = jnp.asarray(group_offset, jnp.int32).reshape(())
    index = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    first_row = jnp.sum(jnp.where(index < offset, sizes, 0))
    wanted = offset + jnp.arange(num_groups, dtype=jnp.int32)
    found = sizes.at[wanted].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return LocalGroups(found, first_row)
