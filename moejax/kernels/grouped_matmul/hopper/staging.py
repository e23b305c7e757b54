"""Stores part of a tile's rows through shared memory, and leaves the rows beside them alone.

The copy engine's copies have static sizes, so there is one of 2^i rows for every set bit i of the
number of rows: a single one where all rows belong to the tile. Mosaic swizzles each row of a slot
by itself, so a copy may start at any row and threads still write without bank conflicts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_ROW_BYTES = 128  # of a slot: the widest swizzle
_SLOTS = 2  # of each warpgroup: one is filled while the other is stored


def num_columns(dtype: Any) -> int:
    """Columns of a slot."""
    return _ROW_BYTES // jnp.dtype(dtype).itemsize


def num_bytes(warpgroups: int, rows: int) -> int:
    """Shared memory that `allocate` takes."""
    return warpgroups * _SLOTS * rows * _ROW_BYTES


def allocate(warpgroups: int, rows: int, dtype: Any) -> Any:
    """Slots for every warpgroup."""
    return plgpu.SMEM((warpgroups, _SLOTS, rows, num_columns(dtype)), dtype)


@dataclasses.dataclass(frozen=True)
class RowStore:
    """Stores rows `[begin, end)` of the part of a tile that starts at `row`.

    `slots` is this warpgroup's part of what `allocate` gave.
    """

    slots: Any
    row: Array
    begin: Array
    end: Array

    def store(self, nth: int, values: Array, out: Any, column: Array) -> None:
        """Starts storing `values` `[rows, columns]` to `out` from `column` on.

        `nth` counts the calls of a task, whose slots take turns.
        """
        slot = self.slots.at[nth % _SLOTS]
        num_rows, columns = values.shape
        owned = self.end - self.begin

        @pl.when(owned > 0)
        def _():
            # What may still be read is the other slot, but for a task's first.
            plgpu.wait_smem_to_gmem(_SLOTS - 1 if nth else 0, wait_read_only=True)
            slot[...] = values
            plgpu.commit_smem()
            height = num_rows
            while height:
                above = self.begin + (owned & -(2 * height))

                @pl.when((owned & height) != 0)
                def _(above=above, height=height):
                    target = out.at[pl.ds(self.row + above, height), pl.ds(column, columns)]
                    plgpu.copy_smem_to_gmem(
                        slot.at[pl.ds(above, height)], target, commit_group=False
                    )

                height //= 2
            plgpu.commit_smem_to_gmem_group()
