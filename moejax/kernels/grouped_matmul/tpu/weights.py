"""The gradient of the groups' matrices: `grad_rhs`, with tiles of its own.

Sums in float32 in VMEM until a group is complete; a group without rows is visited once and gets 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.tpu.blocks import blocks_over_weights
from moejax.kernels.grouped_matmul.tpu.visiting import VisitRefs, call, dot, keep
from moejax.kernels.grouped_matmul.visits import visits_of_groups
from moejax.types import at_least_f32


def grad_rhs(lhs: Array, dout: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]; `[G, K, N]` (`[G, N, K]` if transposed)."""
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    (num_rows, inner), outer, num_groups = a.shape, b.shape[1], groups.sizes.shape[0]
    acc = at_least_f32(jnp.result_type(a, b))
    blocks = blocks_over_weights(num_rows, num_groups, inner, outer)
    visits = visits_of_groups(groups, num_rows, blocks.rows)
    num_visits = visits.group.shape[0]
    return call(
        _kernel(blocks.rows, num_visits),
        visits,
        ((a, b),),
        grid=(pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer), num_visits),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=(
            (
                pl.BlockSpec((blocks.rows, blocks.inner), lambda i, j, v, vs: (vs.tile[v], i)),
                pl.BlockSpec((blocks.rows, blocks.outer), lambda i, j, v, vs: (vs.tile[v], j)),
            ),
        ),
        out_specs=(
            pl.BlockSpec(
                (None, blocks.inner, blocks.outer), lambda i, j, v, vs: (vs.group[v], i, j)
            ),
        ),
        outs=(jax.ShapeDtypeStruct((num_groups, inner, outer), dtype),),
        sums=(jax.ShapeDtypeStruct((blocks.inner, blocks.outer), acc),),
        flops=2 * num_rows * inner * outer,
    )[0]


def _kernel(height: int, num_visits: int) -> Callable[..., None]:
    def kernel(visits: VisitRefs, operands, outs, sums):
        visit, (out,), (total,) = pl.program_id(2), outs, sums
        own = visits.group[visit]
        before = visits.group[jnp.maximum(visit - 1, 0)]
        behind = visits.group[jnp.minimum(visit + 1, num_visits - 1)]

        @pl.when((visit == 0) | (before != own))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(visits.has_rows(visit))
        def _():
            begin, end = visits.rows_in_tile(visit, height)
            left, right = (keep(ref[...], 0, begin, end) for ref in operands)
            total[...] += dot(left, right, (0, 0), dtype=total.dtype)

        @pl.when((visit == num_visits - 1) | (behind != own))
        def _():
            out[...] = total[...].astype(out.dtype)

    return kernel
