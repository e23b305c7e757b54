"""Grouped matmul in plain JAX: a dense matmul per tile of rows, in loops over tiles.

Costs the useful FLOPs plus the rows that round a group up to a tile height. Works on every platform
and on every dtype; the choice on CPU, where `lax.ragged_dot` costs G times the useful FLOPs.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.tiles import plan_tiles, scan_tiles
from moejax.types import at_least_f32


def obstacle(dtype) -> str | None:
    """None: serves every dtype on every platform."""


def forward(lhs: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """out[r] = lhs[r] @ rhs[group of r] (its transpose if `transpose_rhs`); `[R, N]`."""
    contract = ((1,), (1 if transpose_rhs else 0,))
    acc = at_least_f32(jnp.result_type(lhs, rhs))

    def body(tile, out):
        weight = rhs[tile.group]
        rows = lax.dot_general(
            tile.load_all(lhs), weight, (contract, ((), ())), preferred_element_type=acc
        )
        return tile.store(out, rows)

    width = rhs.shape[1 if transpose_rhs else 2]
    out = compat.zeros((lhs.shape[0], width), dtype, like=lhs)
    tiles = plan_tiles(groups.sizes, lhs.shape[0], first_row=groups.first_row)
    return scan_tiles(tiles, body, out)


def grad_lhs(dout: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """dlhs[r] = dout[r] @ rhs[group of r].T; `[R, K]`."""
    return forward(dout, rhs, groups, transpose_rhs=not transpose_rhs, dtype=dtype)


def grad_rhs(lhs: Array, dout: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]; `[G, K, N]` (`[G, N, K]` if transposed)."""
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    acc = at_least_f32(jnp.result_type(lhs, dout))

    def body(tile, drhs):
        over_rows = (((0,), (0,)), ((), ()))
        part = lax.dot_general(tile.load(a), tile.load(b), over_rows, preferred_element_type=acc)
        return tile.add_to_group(drhs, part)

    num_groups = groups.sizes.shape[0]
    drhs = compat.zeros((num_groups, a.shape[1], b.shape[1]), acc, like=lhs)
    tiles = plan_tiles(groups.sizes, lhs.shape[0], first_row=groups.first_row)
    return scan_tiles(tiles, body, drhs).astype(dtype)
