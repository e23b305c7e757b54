"""Weight gradient of grouped matmul on Hopper: per group, the product of two stacks of rows.

A task is one block of one group's matrix; its sum stays in registers in float32 over all the
group's rows, and no two tasks share one. The tensor cores read the left operand transposed from
shared memory, so nothing is transposed in device memory.

Balance: tasks go round robin over the multiprocessors, groups with the most rows first, so the last
round is the cheapest one, and one hot group is cut into as many blocks as every other.

Not yet run on hardware: simulated with race detection, and compiled for an H100.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.hopper import device
from moejax.kernels.grouped_matmul.hopper.weights_kernel import (
    ATOM,
    MULTIPLIERS,
    ROWS,
    TILE,
    Blocks,
    Kernel,
    Runs,
)
from moejax.kernels.tiles import group_bounds

_NARROWEST = 16  # columns of the narrowest swizzle that the tensor cores take
_BARRIER_BYTES = 1024  # barriers, and what the compiler aligns


def grad_rhs(
    lhs: Array,
    dout: Array,
    groups: LocalGroups,
    *,
    transpose_rhs: bool,
    dtype: Any,
    blocks: Blocks | None = None,
) -> Array:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]; `[G, K, N]` (`[G, N, K]` if transposed).

    Copies nothing if the widths are multiples of 16 and R of 8; otherwise operands (and, for
    widths, the result) are padded. `dout` is taken in the dtype of `lhs`.

    Args:
      lhs: `[R, K]`, bfloat16 or float16.
      dout: `[R, N]`.
      groups: of the rows.
      transpose_rhs: swaps the axes of the result.
      dtype: of the result; sums are rounded to it once.
      blocks: by default `choose_blocks`.
    """
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    a, b = a.astype(lhs.dtype), b.astype(lhs.dtype)
    (num_rows, height), width = a.shape, b.shape[1]
    runs = sort_groups(groups, num_rows)
    a, b = _pad(a), _pad(b)
    kernel_dtype = dtype if jnp.dtype(dtype).itemsize in (2, 4) else jnp.float32
    kernel = Kernel(
        blocks or choose_blocks(a.shape[1], b.shape[1]),
        groups.sizes.shape[0],
        a.shape[1],
        b.shape[1],
        jnp.dtype(kernel_dtype),
    )
    drhs = kernel.call(runs, a, b)[:, :height, :width].astype(dtype)
    return compat.vary_alike((drhs, lhs))[0]  # a kernel's results claim to vary over no mesh axis


def choose_blocks(height: int, width: int) -> Blocks:
    """Cuts a `[height, width]` result: the least area, overhang included, if it can be fed.

    For its `height * width` products per row a block reads `height + width` elements. Blocks much
    smaller than 128 x 256 wait for the L2 cache, and count for more by that measure.
    """
    shapes = [(128, w) for w in (256, 192, 128, 64)] + [(256, w) for w in (128, 64)]

    def cost(shape: tuple[int, int]) -> float:
        h, w = shape
        area = pl.cdiv(height, h) * h * pl.cdiv(width, w) * w
        return area * max(1.0, 80 * (1 / h + 1 / w))

    h, w = min(shapes, key=cost)
    left = device.SHARED_MEMORY_BYTES - _BARRIER_BYTES
    slots = min((left - 2 * _store_bytes()) // (2 * ROWS * (h + w)), 6)
    left -= slots * 2 * ROWS * (h + w)
    return Blocks(h, w, slots, min(left // _store_bytes(), 8))


def _store_bytes() -> int:
    """One tile of the result for each of the two multiplying warpgroups: swizzled rows."""
    return MULTIPLIERS * TILE * 128


def sort_groups(groups: LocalGroups, num_rows: int) -> Runs:
    """The groups with the most rows first, cut at `num_rows`."""
    starts, stops = group_bounds(groups.sizes, num_rows, groups.first_row)
    order = jnp.argsort(starts - stops, stable=True).astype(jnp.int32)
    return Runs(order, starts[order].astype(jnp.int32), stops[order].astype(jnp.int32))


def _pad(x: Array) -> Array:
    """Zeros up to what a swizzled copy can move; `x` itself where it can be moved as it is."""
    num_rows, width = x.shape
    rows, columns = -num_rows % ATOM, -width % 64 if width % _NARROWEST else 0
    return jnp.pad(x, ((0, rows), (0, columns))) if rows or columns else x
