"""Grouped matmul on TPU: Pallas kernels for the three products, compiled by Mosaic.

Rows are cut on a fixed grid and every (group, tile) pair is one step of the grid, so any R, K and N
do and no weight is copied or transposed in memory. Blocks may hang over the edges: what is read
there is undefined and is selected away, what is written there is dropped. Forward and `grad_lhs`
are one kernel; `grad_rhs` has its own tiles and sums in float32 until a group is complete.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.visits import Visits, visits_of_groups, visits_of_rows
from moejax.types import at_least_f32

DTYPES = ("float32", "bfloat16")


def obstacle(dtype) -> str | None:
    """Why this implementation cannot serve operands of `dtype` here, or None."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it computes in {' and '.join(DTYPES)}, not in {jnp.dtype(dtype).name}"
    if compat.target_platform() != "tpu" and compat.interpretation() is None:
        return f"it runs on TPU, and this is {compat.target_platform()}"
    return None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a tile, and the widths of a block of the other two dimensions."""

    rows: int
    inner: int
    outer: int


def forward(lhs: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """out[r] = lhs[r] @ rhs[group of r] (its transpose if `transpose_rhs`); `[R, N]`."""
    (num_rows, inner), num_groups = lhs.shape, rhs.shape[0]
    outer = rhs.shape[1 if transpose_rhs else 2]
    blocks = _blocks(num_rows, num_groups, inner, outer, (512, 1024, 1024))
    visits = visits_of_rows(groups, num_rows, blocks.rows)
    steps = pl.cdiv(inner, blocks.inner)
    acc = at_least_f32(jnp.result_type(lhs, rhs))
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def kernel(group, tile, start, stop, lhs_ref, rhs_ref, out_ref, sum_ref):
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when((group[visit] < num_groups) & (start[visit] < stop[visit]))
        def _():
            rows, weight = lhs_ref[...], rhs_ref[...]
            if inner % blocks.inner:
                left = inner - step * blocks.inner
                rows = _keep(rows, 1, 0, left)
                weight = _keep(weight, contract[0][1][0], 0, left)
            sum_ref[...] += lax.dot_general(rows, weight, contract, preferred_element_type=acc)

        @pl.when((step == steps - 1) & (start[visit] < stop[visit]))
        def _():
            above = tile[visit] * blocks.rows
            own = _inside(out_ref.shape, 0, start[visit] - above, stop[visit] - above)
            out_ref[...] = jnp.where(own, sum_ref[...].astype(dtype), out_ref[...])

    def weight_block(n, visit, step, group, *_):
        at = jnp.minimum(group[visit], num_groups - 1)
        return (at, n, step) if transpose_rhs else (at, step, n)

    widths = (blocks.outer, blocks.inner) if transpose_rhs else (blocks.inner, blocks.outer)
    return _call(
        kernel,
        visits,
        (lhs, rhs),
        out=jax.ShapeDtypeStruct((num_rows, outer), dtype),
        grid=(pl.cdiv(outer, blocks.outer), visits.group.shape[0], steps),
        in_specs=[
            pl.BlockSpec((blocks.rows, blocks.inner), lambda n, v, k, _, tile, *__: (tile[v], k)),
            pl.BlockSpec((None, *widths), weight_block),
        ],
        out_spec=pl.BlockSpec(
            (blocks.rows, blocks.outer), lambda n, v, k, _, tile, *__: (tile[v], n)
        ),
        scratch=pltpu.VMEM((blocks.rows, blocks.outer), acc),
        semantics=("parallel", "arbitrary", "arbitrary"),
        flops=2 * num_rows * inner * outer,
    )


def grad_lhs(dout: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """dlhs[r] = dout[r] @ rhs[group of r].T; `[R, K]`."""
    return forward(dout, rhs, groups, transpose_rhs=not transpose_rhs, dtype=dtype)


def grad_rhs(lhs: Array, dout: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]; `[G, K, N]` (`[G, N, K]` if transposed)."""
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    (num_rows, inner), outer, num_groups = a.shape, b.shape[1], groups.sizes.shape[0]
    acc = at_least_f32(jnp.result_type(a, b))
    blocks = _blocks(num_rows, num_groups, inner, outer, (512, 1024, 512))
    visits = visits_of_groups(groups, num_rows, blocks.rows)
    num_visits = visits.group.shape[0]

    def kernel(group, tile, start, stop, a_ref, b_ref, out_ref, sum_ref):
        visit = pl.program_id(2)
        own = group[visit]

        @pl.when((visit == 0) | (group[jnp.maximum(visit - 1, 0)] != own))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(start[visit] < stop[visit])
        def _():
            above = tile[visit] * blocks.rows
            begin, end = start[visit] - above, stop[visit] - above
            left, right = (_keep(ref[...], 0, begin, end) for ref in (a_ref, b_ref))
            over_rows = (((0,), (0,)), ((), ()))
            sum_ref[...] += lax.dot_general(left, right, over_rows, preferred_element_type=acc)

        @pl.when((visit == num_visits - 1) | (group[jnp.minimum(visit + 1, num_visits - 1)] != own))
        def _():
            out_ref[...] = sum_ref[...].astype(dtype)

    return _call(
        kernel,
        visits,
        (a, b),
        out=jax.ShapeDtypeStruct((num_groups, inner, outer), dtype),
        grid=(pl.cdiv(inner, blocks.inner), pl.cdiv(outer, blocks.outer), num_visits),
        in_specs=[
            pl.BlockSpec((blocks.rows, blocks.inner), lambda i, j, v, _, tile, *__: (tile[v], i)),
            pl.BlockSpec((blocks.rows, blocks.outer), lambda i, j, v, _, tile, *__: (tile[v], j)),
        ],
        out_spec=pl.BlockSpec(
            (None, blocks.inner, blocks.outer), lambda i, j, v, group, *_: (group[v], i, j)
        ),
        scratch=pltpu.VMEM((blocks.inner, blocks.outer), acc),
        semantics=("parallel", "parallel", "arbitrary"),
        flops=2 * num_rows * inner * outer,
    )


def _call(
    kernel, visits: Visits, operands, *, out, grid, in_specs, out_spec, scratch, semantics, flops
):
    moved = sum(x.size * x.dtype.itemsize for x in (*operands, out))
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=compat.interpretation() or False,
    )(visits.group, visits.tile, visits.start, visits.stop, *operands)


def _blocks(
    num_rows: int, num_groups: int, inner: int, outer: int, most: tuple[int, int, int]
) -> Blocks:
    """Tiles about as high as a group, at most `most`; lanes are 128 wide, sublanes of bf16 16."""
    height = max(128, min(most[0], 1 << (max(num_rows // num_groups, 1) - 1).bit_length()))
    fit = lambda block, size, unit: min(block, -(-size // unit) * unit)
    return Blocks(fit(height, num_rows, 16), fit(most[1], inner, 128), fit(most[2], outer, 128))


def _inside(shape: tuple[int, ...], axis: int, start, stop) -> Array:
    index = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (index >= start) & (index < stop)


def _keep(x: Array, axis: int, start, stop) -> Array:
    """Zero outside `[start, stop)`, by selection: what lies there may be NaN."""
    return jnp.where(_inside(x.shape, axis, start, stop), x, jnp.zeros_like(x))
