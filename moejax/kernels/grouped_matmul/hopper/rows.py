"""Grouped matmul over rows on Hopper: forward, and the gradient of the rows.

Not yet run on hardware: simulated with race detection, and compiled for an H100.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.hopper.persistent import Blocks, multiply


def forward(
    lhs: Array,
    rhs: Array,
    groups: LocalGroups,
    *,
    transpose_rhs: bool,
    dtype,
    blocks: Blocks | None = None,
) -> Array:
    """out[r] = lhs[r] @ rhs[group of r] (its transpose if `transpose_rhs`); `[R, N]`.

    Copies nothing if K and N are multiples of 64 and R of 8; otherwise operands are padded.

    Args:
      lhs: `[R, K]` in bfloat16 or float16.
      rhs: `[G, K, N]`, or `[G, N, K]` if `transpose_rhs`.
      groups: of the rows; rows of nobody come back as zeros.
      transpose_rhs: multiply by the transpose of the group's matrix.
      dtype: of the result: float32, bfloat16 or float16.
      blocks: how to cut the work; chosen by default.
    """
    operands = jnp.result_type(lhs, rhs)
    (out,) = multiply(
        lhs.astype(operands),
        (rhs.astype(operands),),
        (),
        groups,
        transpose=transpose_rhs,
        finish=lambda sums, _: sums,
        num_results=1,
        dtype=dtype,
        blocks=blocks,
    )
    return out


def grad_lhs(
    dout: Array,
    rhs: Array,
    groups: LocalGroups,
    *,
    transpose_rhs: bool,
    dtype,
    blocks: Blocks | None = None,
) -> Array:
    """dlhs[r] = dout[r] @ rhs[group of r].T; `[R, K]`.

    A wider `dout` is rounded to the dtype of `rhs`, as tensor cores multiply no other pair.
    """
    dout = dout.astype(rhs.dtype)
    return forward(dout, rhs, groups, transpose_rhs=not transpose_rhs, dtype=dtype, blocks=blocks)
