"""Runs a kernel at every visit of a group to a tile of rows, and what kernels do with blocks.

The list of visits is prefetched into scalar memory, where index maps look up which tile of rows and
which group a step needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.tpu.blocks import VMEM_LIMIT_BYTES
from moejax.kernels.grouped_matmul.visits import Visits


class VisitRefs(NamedTuple):
    """`Visits` in scalar memory, as kernels and index maps read them."""

    group: Any
    tile: Any
    start: Any
    stop: Any

    def has_rows(self, visit: Array) -> Array:
        """Whether the visit adds anything: an empty group does not, nor does an unused visit."""
        return self.start[visit] < self.stop[visit]

    def rows_in_tile(self, visit: Array, height: int) -> tuple[Array, Array]:
        """The group's rows `[begin, end)`, counted from the first one of the tile."""
        above = self.tile[visit] * height
        return self.start[visit] - above, self.stop[visit] - above


def inside(shape: tuple[int, ...], axis: int, start: Array | int, stop: Array | int) -> Array:
    """Whether an element's index along `axis` lies in `[start, stop)`."""
    index = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (index >= start) & (index < stop)


def keep(x: Array, axis: int, start: Array | int, stop: Array | int) -> Array:
    """Zero outside `[start, stop)`, by selection: what lies there may be NaN."""
    return jnp.where(inside(x.shape, axis, start, stop), x, jnp.zeros_like(x))


def dot(a: Array, b: Array, axes: tuple[int, int], dtype: Any) -> Array:
    """Contracts these axes of two matrices and accumulates in `dtype`."""
    # Products of bfloat16 are exact in float32 as it is, and Mosaic refuses a higher precision.
    is_f32 = jnp.result_type(a, b) == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=None if is_f32 else lax.Precision.DEFAULT,
        preferred_element_type=dtype,
    )


def call(
    kernel: Any,
    visits: Visits,
    operands: tuple[tuple[Array, ...], ...],
    *,
    grid: tuple[int, ...],
    semantics: tuple[str, ...],
    in_specs: tuple[tuple[pl.BlockSpec, ...], ...],
    out_specs: tuple[pl.BlockSpec, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
    sums: tuple[jax.ShapeDtypeStruct, ...],
    flops: int,
    transcendentals: int = 0,
) -> tuple[Array, ...]:
    """Runs `kernel(visits, *operands, outs, sums)` at every step of the grid; returns the outs.

    The kernel gets `VisitRefs` and tuples of refs, grouped as `operands` are.

    Args:
      out_specs: of each of `outs`.
      sums: what is kept in VMEM from one step to the next.
      flops, transcendentals: of the whole call, for XLA's scheduler.
    """
    varying = jax.typeof(visits.group).manual_axis_type  # operands vary alike: compat.vary_alike
    cost = pl.CostEstimate(
        flops=flops,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, outs))),
        transcendentals=transcendentals,
    )
    return pl.pallas_call(
        kernel,
        out_shape=(
            tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outs),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=(out_specs,),
            scratch_shapes=[tuple(pltpu.VMEM(x.shape, x.dtype) for x in sums)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=cost,
        interpret=compat.interpretation() or False,
    )(VisitRefs(visits.group, visits.tile, visits.start, visits.stop), *operands)[0]
