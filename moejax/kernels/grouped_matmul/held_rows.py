"""Puts the rows of the groups first and zero behind them, for libraries that want them so.

Such libraries know no first row and leave what lies behind the last group undefined, or multiply
it by a mask, which keeps NaN. Here it is selected away, before and after.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax.kernels.grouped_matmul.groups import LocalGroups


def to_front(rows: Array, groups: LocalGroups) -> Array:
    """The groups' rows from row 0 on, zero behind them; `[R, ...]`."""
    return _only_held(rolled_to_front(rows, groups), groups)


def rolled_to_front(rows: Array, groups: LocalGroups) -> Array:
    """The groups' rows from row 0 on, and behind them what the others hold; `[R, ...]`."""
    return _roll(rows, -groups.first_row)


def to_place(rows: Array, groups: LocalGroups) -> Array:
    """Back from `to_front`: the groups' rows where they were, zero in all others; `[R, ...]`."""
    return _roll(_only_held(rows, groups), groups.first_row)


def _roll(rows: Array, shift: Array | int) -> Array:
    return rows if isinstance(shift, int) else jnp.roll(rows, shift, axis=0)


def _only_held(rows: Array, groups: LocalGroups) -> Array:
    held = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(groups.sizes)
    return jnp.where(held[:, None], rows, 0)
