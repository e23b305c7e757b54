"""The kernel under `rows` and `glu`: a persistent loop over (tile of rows, block of columns) tasks.

Of the three warpgroups of a block one only copies: it fills a ring of shared memory slots, task
after task without a pause. The other two each multiply half of a tile's rows, so the copies for the
next task go on while this one's result is stored. Weights are read as they lie in memory: the
tensor cores take a block of either orientation.

Not yet run on hardware: simulated with race detection, and compiled for an H100.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.hopper import device, staging
from moejax.kernels.grouped_matmul.hopper.ring import Ring
from moejax.kernels.grouped_matmul.hopper.tasks import ALIGNMENT, Order, Tasks, plan

_SWIZZLE_BYTES = 128
LANES = 64  # 16-bit elements of a swizzled row: widths are multiples of it
_WARPGROUPS = 2  # that multiply
_HALF = 64  # rows of one of them: the height of a tensor core instruction
HEIGHT = _WARPGROUPS * _HALF
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232  # of 65536, shared by 128 and 2 x 128 threads
_BARRIER_BYTES = 1024
_COST_OF_ROWS = 48  # what it costs a block to read its rows, in columns: a guess, to be measured

Finish = Callable[..., tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work.

    Attributes:
      columns: of one weight's block, a multiple of 64; of all weights together at most 256, for
        which a warpgroup's sums take 128 of its 232 registers.
      stages: slots of the ring; at least 2.
    """

    columns: int
    stages: int


def choose_blocks(width: int, num_weights: int, dtype: Any) -> Blocks:
    """The cheapest width of a block, and as many stages as shared memory holds."""
    cost = lambda c: pl.cdiv(width, c) * (num_weights * c + _COST_OF_ROWS)
    columns = min(range(LANES, 256 // num_weights + 1, LANES), key=cost)
    stage = jnp.dtype(dtype).itemsize * LANES * (HEIGHT + num_weights * columns)
    fixed = _BARRIER_BYTES + staging.num_bytes(_WARPGROUPS, _HALF)
    return Blocks(columns, min((device.SHARED_MEMORY_BYTES - fixed) // stage, 8))


def multiply(
    lhs: Array,
    weights: tuple[Array, ...],
    biases: tuple[Array, ...],
    groups: LocalGroups,
    *,
    transpose: bool,
    finish: Finish,
    num_results: int,
    dtype: Any,
    blocks: Blocks | None = None,
) -> tuple[Array, ...]:
    """`finish((lhs Wa, lhs Wb, ...), biases)` for each row's group, zero for rows of nobody.

    Args:
      lhs: `[R, K]` in bfloat16 or float16.
      weights: each `[G, K, N]`, or `[G, N, K]` if `transpose`, in lhs's dtype.
      biases: `[G, N]` for each weight, or empty.
      groups: of the rows.
      transpose: multiply by the transpose of the group's matrices.
      finish: `(sums, biases)` to the results, elementwise. Sums are float32 `[rows, columns]`, the
        biases likewise, every row the same.
      num_results: how many.
      dtype: of the results.
      blocks: by default `choose_blocks`.

    Returns:
      The results, each `[R, N]`.
    """
    num_rows, width = lhs.shape[0], weights[0].shape[1 if transpose else 2]
    lhs = _pad(lhs, (ALIGNMENT, LANES))
    weights = tuple(_pad(w, (1, LANES, LANES)) for w in weights)
    biases = tuple(_pad(b, (1, LANES)) for b in biases)
    padded = weights[0].shape[1 if transpose else 2]
    blocks = blocks or choose_blocks(padded, len(weights), lhs.dtype)
    out = jax.ShapeDtypeStruct((lhs.shape[0], padded), dtype)
    kernel = _Kernel(blocks, transpose, finish, out, num_results, len(weights), len(biases))
    tasks = plan(groups, num_rows, HEIGHT)
    outs = kernel.call(tasks, lhs, weights, biases)
    # A kernel's results claim to vary over no mesh axis.
    _, *outs = compat.vary_alike((lhs, *outs))
    return tuple(x[:num_rows, :width] for x in outs)


def _pad(x: Array, multiples: tuple[int, ...]) -> Array:
    """Zeros behind every axis up to a multiple; `x` itself where it is one already."""
    pads = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, pads) if any(p for _, p in pads) else x


@dataclasses.dataclass(frozen=True)
class _Kernel:
    blocks: Blocks
    transpose: bool
    finish: Finish
    out: jax.ShapeDtypeStruct
    num_results: int
    num_weights: int
    num_biases: int

    def call(self, tasks: Tasks, lhs: Array, weights, biases) -> tuple[Array, ...]:
        stages, columns = self.blocks.stages, self.blocks.columns
        block = (columns, LANES) if self.transpose else (LANES, columns)
        tiled = (plgpu.TilingTransform((8, LANES)), plgpu.SwizzleTransform(_SWIZZLE_BYTES))
        ring = lambda *shape: plgpu.SMEM((stages, *shape), lhs.dtype, transforms=tiled)
        barrier = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        kernel = plgpu.kernel(
            self._block,
            out_type=(self.out,) * self.num_results,
            scratch_types=(
                ring(HEIGHT, LANES),
                [ring(*block) for _ in weights],
                staging.allocate(_WARPGROUPS, _HALF, self.out.dtype),
                barrier(1 + self.num_weights),
                barrier(_WARPGROUPS),
            ),
            grid=(device.num_multiprocessors(),),
            grid_names=("sm",),
            num_threads=_WARPGROUPS + 1,
            thread_name="warpgroup",
        )
        return kernel(*jax.tree.leaves(tasks), lhs, *weights, *biases)

    def _block(self, *refs) -> None:
        """What one multiprocessor does."""
        tasks, (lhs,), weights, biases, outs, scratch = _split(
            refs, 5, 1, self.num_weights, self.num_biases, self.num_results
        )
        tasks = Tasks(*tasks)
        lhs_ring, weight_rings, slots, full, empty = scratch
        ring = Ring(self.blocks.stages, lhs.shape[1] // LANES, full, empty)
        num_columns = pl.cdiv(self.out.shape[1], self.blocks.columns)
        order = Order(num_columns, device.num_multiprocessors())
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @order.loop(0, tasks.counts[0])
            def _(nth, tile, column):
                self._copy_in(ring, nth, tasks, tile, column, lhs, weights, lhs_ring, weight_rings)

            ring.finish(order.count(0, tasks.counts[0]))

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
            halves = lhs_ring.at[:, pl.ds(warpgroup * _HALF, _HALF)]

            @order.loop(0, tasks.counts[0])
            def _(nth, tile, column):
                rows = self._rows(tasks, tile, warpgroup, slots)
                group = tasks.group[tile]
                sums = self._sum(ring, nth, halves, weight_rings)
                self._store(rows, sums, [b.at[group] for b in biases], column, outs)

            @order.loop(tasks.counts[0], tasks.counts[1])
            def _(nth, tile, column):
                self._store_zeros(self._rows(tasks, tile, warpgroup, slots), column, outs)

            plgpu.wait_smem_to_gmem(0)

    def _copy_in(self, ring, nth, tasks, tile, column, lhs, weights, lhs_ring, weight_rings):
        """Fills the ring with a task's blocks."""
        columns = self.blocks.columns
        across = pl.ds(pl.multiple_of(column * columns, LANES), columns)
        row = pl.multiple_of(tasks.row[tile], ALIGNMENT)
        group = tasks.group[tile]

        @ring.fill(nth)
        def _(step, slot, barrier):
            inner = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)
            plgpu.copy_gmem_to_smem(lhs.at[pl.ds(row, HEIGHT), inner], lhs_ring.at[slot], barrier)
            at = (group, across, inner) if self.transpose else (group, inner, across)
            for weight, weight_ring in zip(weights, weight_rings, strict=True):
                plgpu.copy_gmem_to_smem(weight.at[at], weight_ring.at[slot], barrier)

    def _sum(self, ring, nth, halves, weight_rings) -> tuple[Array, ...]:
        """The products of a task, each `[_HALF, columns]` in float32."""

        def accumulate(*sums):
            @ring.drain(nth, self.num_weights)
            def _(slot):
                for total, weight_ring in zip(sums, weight_rings, strict=True):
                    weight = weight_ring.at[slot]
                    weight = weight.transpose((1, 0)) if self.transpose else weight
                    plgpu.wgmma(total, halves.at[slot], weight)

            return tuple(total[...] for total in sums)

        zeros = plgpu.ACC((_HALF, self.blocks.columns), jnp.float32)
        sums = pl.run_scoped(accumulate, *[zeros] * self.num_weights)
        ring.release_last(nth)
        return sums

    def _rows(self, tasks, tile, warpgroup, slots) -> staging.RowStore:
        row = pl.multiple_of(tasks.row[tile] + warpgroup * _HALF, ALIGNMENT)
        begin = jnp.clip(tasks.start[tile] - row, 0, _HALF)
        end = jnp.clip(tasks.stop[tile] - row, 0, _HALF)
        return staging.RowStore(slots.at[warpgroup], row, begin, end)

    def _store(self, rows, sums, biases, column, outs) -> None:
        """Finishes a task's sums and stores them, a slot's columns at a time."""

        def results(offset, step, first):
            here = tuple(total[:, offset : offset + step] for total in sums)
            return self.finish(here, tuple(_over_rows(bias, first, step) for bias in biases))

        self._store_columns(rows, column, outs, results)

    def _store_zeros(self, rows, column, outs) -> None:
        def results(offset, step, first):
            zeros = jnp.zeros((_HALF, step), self.out.dtype)
            return (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * self.num_results

        self._store_columns(rows, column, outs, results)

    def _store_columns(self, rows, column, outs, results) -> None:
        step = staging.num_columns(self.out.dtype)
        nth = itertools.count()
        for offset in range(0, self.blocks.columns, step):
            first = pl.multiple_of(column * self.blocks.columns + offset, step)

            @pl.when(first < self.out.shape[1])  # the last block may hang over the edge
            def _(offset=offset, first=first):
                for out, result in zip(outs, results(offset, step, first), strict=True):
                    rows.store(next(nth), result.astype(self.out.dtype), out, first)


def _over_rows(bias: Any, first: Array, columns: int) -> Array:
    """Some columns of a row, for every row of a warpgroup; float32 `[_HALF, columns]`."""
    layout = plgpu.Layout.WGMMA.reduce(0)
    values = plgpu.load(bias.at[pl.ds(first, columns)], layout=layout, optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), (_HALF, columns), [1])


def _split(items: tuple, *counts: int) -> list[tuple]:
    """Consecutive runs of `counts` items, and the rest."""
    ends = list(itertools.accumulate(counts))
    return [items[i:j] for i, j in zip([0, *ends], [*ends, len(items)], strict=True)]
