"""Grouped matmul: every row times the matrix of its group, with hand-written gradients.

Rows are sorted by group and group sizes are values, not shapes, so one compiled function serves
every routing. (Gale et al., MegaBlocks, arXiv 2211.15841.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.groups import local_groups
from moejax.kernels.grouped_matmul.implementations import IMPLEMENTATIONS, choose, module

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]


def grouped_matmul(
    lhs: Float[Array, "R K"],
    rhs: Float[Array, "G K N"] | Float[Array, "G N K"],
    group_sizes: Int[Array, " all"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    transpose_rhs: bool = False,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "R N"]:
    """out[r] = lhs[r] @ rhs[g], where g is the group of row r.

    Group g owns `group_sizes[g]` consecutive rows, after those of the groups before it. Rows past
    the sum of the sizes return zero and get a zero gradient, and whatever they hold in `lhs` or in
    the cotangent, NaN included, reaches nothing. Products accumulate in at least float32.

    Works under jit, grad, scan, shard_map and (sequentially) vmap. Differentiates once, in reverse
    mode. All three products run on operands of the dtype promoted from `lhs` and `rhs` (a wider
    cotangent is rounded to it), and gradients come back in the dtypes of `lhs` and `rhs`.

    Args:
      lhs: the rows; any R, also 0.
      rhs: one matrix per group; `[G, N, K]` if `transpose_rhs`.
      group_sizes: rows per group, zero allowed. None may be negative and their sum must not exceed
        R: values are checked only under `jax.experimental.checkify.checkify`, where it costs
        something.
      group_offset: None if `rhs` holds every group. Otherwise `rhs` holds the G groups from this
        one on, `group_sizes` still counts the rows of all groups, and rows of the other groups
        count as unused.
      transpose_rhs: multiply by the transpose of the group's matrix.
      preferred_element_type: dtype of the result; by default that of lhs and rhs promoted.
      implementation: one of `IMPLEMENTATIONS`, or None to let `dispatch.choose` pick.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      UserError: an unknown implementation, or one that cannot serve this call.
    """
    _check(lhs, rhs, group_sizes, group_offset, transpose_rhs)
    _check_values(group_sizes, lhs.shape[0])
    choice = choose("grouped_matmul", implementation, jnp.result_type(lhs, rhs))
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs))
    if 0 in (lhs.shape[0], *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]), dtype)
    operands = compat.vary_alike((lhs, rhs, group_sizes, group_offset))
    return _grouped_matmul(transpose_rhs, dtype, choice, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped_matmul(transpose_rhs, dtype, choice, lhs, rhs, group_sizes, group_offset):
    groups = local_groups(group_sizes, group_offset, rhs.shape[0])
    lhs, rhs = _as(jnp.result_type(lhs, rhs), lhs, rhs)
    forward = module(choice.forward).forward
    return forward(lhs, rhs, groups, transpose_rhs=transpose_rhs, dtype=dtype)


def _save(transpose_rhs, dtype, choice, *operands):
    return _grouped_matmul(transpose_rhs, dtype, choice, *operands), operands


def _backward(transpose_rhs, dtype, choice, operands, dout):
    lhs, rhs, group_sizes, group_offset = operands
    groups = local_groups(group_sizes, group_offset, rhs.shape[0])
    into = {"lhs": lhs.dtype, "rhs": rhs.dtype}
    lhs, rhs, dout = _as(jnp.result_type(lhs, rhs), lhs, rhs, dout)
    options = {"transpose_rhs": transpose_rhs}
    dlhs = module(choice.grad_lhs).grad_lhs(dout, rhs, groups, dtype=into["lhs"], **options)
    drhs = module(choice.grad_rhs).grad_rhs(lhs, dout, groups, dtype=into["rhs"], **options)
    return dlhs, drhs, None, None


def _as(dtype, *arrays):
    return tuple(array.astype(dtype) for array in arrays)


_grouped_matmul.defvjp(_save, _backward)


def _check(lhs, rhs, group_sizes, group_offset, transpose_rhs) -> None:
    inner = 2 if transpose_rhs else 1
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[inner]:
        wanted = "[R, K] and [G, N, K]" if transpose_rhs else "[R, K] and [G, K, N]"
        raise ValueError(
            f"grouped_matmul(transpose_rhs={transpose_rhs}) needs lhs and rhs of shapes {wanted}; "
            f"got {lhs.shape} and {rhs.shape}"
        )
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            "grouped_matmul needs group_sizes as a vector of integers; "
            f"got {group_sizes.dtype}{list(group_sizes.shape)}"
        )
    if group_offset is None and group_sizes.shape[0] != rhs.shape[0]:
        raise ValueError(
            f"grouped_matmul got {group_sizes.shape[0]} group sizes for {rhs.shape[0]} matrices; "
            "pass group_offset if rhs holds only a slice of the groups"
        )
    for name, value in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"grouped_matmul needs floating-point {name}; got {value.dtype}")


def _check_values(group_sizes: Array, num_rows: int) -> None:
    """Does nothing except in a function that the user wrapped in `checkify.checkify`."""
    checkify.debug_check(
        jnp.all(group_sizes >= 0),
        "grouped_matmul got a negative group size: {least}",
        least=jnp.min(group_sizes, initial=0),
    )
    checkify.debug_check(
        jnp.sum(group_sizes) <= num_rows,
        "grouped_matmul got group sizes that sum to {total}, more than its {rows} rows",
        total=jnp.sum(group_sizes),
        rows=jnp.int32(num_rows),
    )
