"""Grouped matmul by XLA's ragged dot: a real kernel on TPU v5p, elsewhere a dense expansion.

XLA leaves rows past the last group undefined on some platforms and has no group offset, so rows are
rolled to the front, and rows that belong to no group are selected to zero before and after.

Where XLA expands a product (CPU, GPU by default, all TPUs but v5p: `compat.has_ragged_dot`)
it costs G times the work, and a NaN in any group's weight reaches every row; a NaN in an unused
row reaches nothing on any platform. For v5p XLA expands it too, without a word, where the number of
rows is not a multiple of 8, so rows are filled up there.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import ragged_dims
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.held_rows import to_front, to_place
from moejax.types import at_least_f32


def obstacle(dtype) -> str | None:
    """None: serves every dtype on every platform."""


def forward(lhs: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """out[r] = lhs[r] @ rhs[group of r] (its transpose if `transpose_rhs`); `[R, N]`."""
    dims = ragged_dims.of_rows(transpose_rhs=transpose_rhs)
    out = _ragged_dot(_whole_tiles(to_front(lhs, groups)), rhs, groups, dims, dtype)
    return to_place(out[: lhs.shape[0]], groups)


def grad_lhs(dout: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """dlhs[r] = dout[r] @ rhs[group of r].T; `[R, K]`."""
    return forward(dout, rhs, groups, transpose_rhs=not transpose_rhs, dtype=dtype)


def grad_rhs(lhs: Array, dout: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]; `[G, K, N]` (`[G, N, K]` if transposed)."""
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    a, b = (_whole_tiles(to_front(rows, groups)) for rows in (a, b))
    drhs = _ragged_dot(a, b, groups, ragged_dims.OVER_ROWS, dtype)
    empty = (groups.sizes == 0)[:, None, None]
    return jnp.where(empty, 0, drhs)


def _whole_tiles(rows: Array) -> Array:
    """Where there is a kernel, with rows of nobody behind up to a multiple of 8."""
    fill = -rows.shape[0] % 8 if compat.has_ragged_dot() else 0
    return jnp.pad(rows, ((0, fill), (0, 0))) if fill else rows


def _ragged_dot(a: Array, b: Array, groups: LocalGroups, dims, dtype) -> Array:
    """Summed in at least float32. The kernel does so whatever it returns; an expansion may not."""
    wide = at_least_f32(jnp.result_type(a, b))
    result = dtype if compat.has_ragged_dot() else wide
    out = lax.ragged_dot_general(a, b, groups.sizes, dims, preferred_element_type=result)
    return out.astype(dtype)
