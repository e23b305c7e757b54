"""The kernel under `weights`: sums of products of rows, block by block of every group's matrix.

Of the three warpgroups of a block two multiply half of the matrix block each, and one fills a ring
of shared memory slots with rows for them. It does not pause between tasks: the rows of the next one
arrive while the result of this one is stored.

A group's rows need not start at a multiple of anything: in its first and last slot, and only there,
the rows of others are replaced by zeros in both operands (0 * NaN is NaN). The copying warpgroup
does this, up to a ring's length ahead of those that multiply.
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
from jaxtyping import Int

from moejax.kernels.grouped_matmul.hopper import device

ROWS = 64  # contracted per slot
TILE = 64  # rows of the result stored at once
MULTIPLIERS = 2  # warpgroups; the third one copies
ATOM = 8  # rows that the copy engine moves as one: copies start at multiples of it
_LANES = 64  # columns cleared at once
_COPIES = 2  # that fill a slot
_PANEL = 8  # blocks of columns that go through all blocks of rows together, for the L2 cache
# Per thread: 128 * (2 * 224 + 56) <= 65536.
_MULTIPLY_REGISTERS, _COPY_REGISTERS = 224, 56


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel cuts its work.

    Attributes:
      height: of a block of the result, 128 or 256: half of it for each multiplying warpgroup.
      width: of a block of the result; `height * width` is at most 128 * 256, what registers hold.
      slots: of the ring, at least 2.
      stores: tiles of the result on their way to memory, per warpgroup.
    """

    height: int
    width: int
    slots: int
    stores: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """The groups by falling number of rows: `group[i]` owns the rows `[start[i], stop[i])`.

    References to them inside the kernel.
    """

    group: Int[Array, " G"] | Any
    start: Int[Array, " G"] | Any
    stop: Int[Array, " G"] | Any


def _swizzle(itemsize: int, *widths: int) -> int:
    """Bytes of the widest swizzled row that divides every width."""
    return next(s for s in (128, 64, 32) if not any(w * itemsize % s for w in widths))


def _transforms(swizzle: int, itemsize: int):
    tiling = plgpu.TilingTransform((ATOM, swizzle // itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)


def locate(block: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Row and column of the nth of `shape` blocks, one panel of columns after another.

    Divides by constants alone: the compiler narrows a small quotient of variables to 16 bits, for
    which it calls a function, and where there are calls no two products of the tensor cores
    overlap. (`plgpu.planar_snake` divides so for some shapes, those of gpt-oss among them.)
    """
    rows, columns = shape
    panels = columns // _PANEL
    panel, within = lax.div(block, _PANEL * rows), lax.rem(block, _PANEL * rows)
    row, column = lax.div(within, _PANEL), panel * _PANEL + lax.rem(within, _PANEL)
    if rest := columns - panels * _PANEL:  # a narrower last panel
        within = block - panels * _PANEL * rows
        last = within >= 0
        row = jnp.where(last, lax.div(within, rest), row)
        column = jnp.where(last, panels * _PANEL + lax.rem(within, rest), column)
    return row, column


def _clear(block, start: Array, stop: Array) -> None:
    """Zeros in place of all rows of `block` `[64, width]` but `[start, stop)`."""
    row = lax.broadcasted_iota(jnp.int32, (ROWS, _LANES), 0)
    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA)
    own = (row >= start) & (row < stop)
    for column in range(0, block.shape[1], _LANES):
        part = block.at[:, pl.ds(column, _LANES)]
        value = part[...]
        part[...] = jnp.where(own, value, jnp.zeros_like(value))


@dataclasses.dataclass(frozen=True)
class _Task:
    """One block of a group's result, `steps` slots of rows from `first` on."""

    group: Array
    start: Array
    stop: Array
    first: Array
    steps: Array
    row: Array
    column: Array


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Slots for rows of both operands, and the barriers that hand them on."""

    a: Any
    b: Any
    ready: Any
    edge: Any
    free: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Result `[num_groups, height, width]`."""

    blocks: Blocks
    num_groups: int
    height: int
    width: int
    dtype: Any

    def call(self, runs: Runs, a: Array, b: Array) -> Array:
        cut, itemsize = self.blocks, self.dtype.itemsize
        operand = _transforms(_swizzle(2, self.height, self.width), 2)
        swizzle = _swizzle(itemsize, self.width)
        tile = (MULTIPLIERS, cut.stores, TILE, swizzle // itemsize)
        return plgpu.kernel(
            self._body,
            out_type=jax.ShapeDtypeStruct((self.num_groups, self.height, self.width), self.dtype),
            scratch_types=[
                plgpu.SMEM((cut.slots, ROWS, cut.height), a.dtype, transforms=operand),
                plgpu.SMEM((cut.slots, ROWS, cut.width), b.dtype, transforms=operand),
                plgpu.SMEM(tile, self.dtype, transforms=_transforms(swizzle, itemsize)),
                plgpu.Barrier(num_arrivals=_COPIES, num_barriers=cut.slots),
                plgpu.Barrier(num_arrivals=_COPIES),
                plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=cut.slots),
            ],
            grid=(device.num_multiprocessors(),),
            grid_names=("sm",),
            num_threads=MULTIPLIERS + 1,
            thread_name="warpgroup",
            kernel_name="grouped_matmul_grad_rhs",
        )(runs.group, runs.start, runs.stop, a, b)

    def _body(self, group, start, stop, a, b, out, a_ring, b_ring, tiles, ready, edge, free):
        runs, ring = Runs(group, start, stop), _Ring(a_ring, b_ring, ready, edge, free)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == MULTIPLIERS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            used = self._each_task(runs, lambda task, count: self._fill(task, count, a, b, ring))

            @pl.loop(jnp.maximum(used - self.blocks.slots, 0), used)  # until all are free again
            def _(count):
                plgpu.barrier_wait(ring.free.at[lax.rem(count, self.blocks.slots)])

        @pl.when(warpgroup < MULTIPLIERS)
        def _():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
            self._each_task(runs, lambda task, count: self._multiply(task, count, ring, out, tiles))
            plgpu.wait_smem_to_gmem(0)

    def _each_task(self, runs: Runs, run: Callable[[_Task, Array], Array]) -> Array:
        """`count = run(task, count)` for this multiprocessor's tasks; the number of slots used."""
        shape = pl.cdiv(self.height, self.blocks.height), pl.cdiv(self.width, self.blocks.width)
        per_group = shape[0] * shape[1]

        @plgpu.nd_loop((self.num_groups, per_group), collective_axes="sm", init_carry=jnp.int32(0))
        def used(info: plgpu.NDLoopInfo, carry: Array) -> Array:
            i, block = info.index
            row, column = locate(block, shape)
            start, stop = runs.start[i], runs.stop[i]
            first = start // ATOM * ATOM
            steps = jnp.where(stop > start, pl.cdiv(stop - first, ROWS), 0)
            at = row * self.blocks.height, column * self.blocks.width
            return run(_Task(runs.group[i], start, stop, first, steps, *at), carry)

        return used

    def _fill(self, task: _Task, count: Array, a, b, ring: _Ring) -> Array:
        """Copies the group's rows into slots as they become free; `count` were used before."""

        def step(i: Array, count: Array) -> Array:
            slot = lax.rem(count, self.blocks.slots)
            above = task.first + i * ROWS
            has_others = (above < task.start) | (above + ROWS > task.stop)
            pl.when(count >= self.blocks.slots)(lambda: plgpu.barrier_wait(ring.free.at[slot]))

            def copy(barrier) -> None:
                rows = pl.ds(pl.multiple_of(above, ATOM), ROWS)
                for source, target, at in ((a, ring.a, task.row), (b, ring.b, task.column)):
                    columns = pl.ds(at, target.shape[2])
                    plgpu.copy_gmem_to_smem(source.at[rows, columns], target.at[slot], barrier)

            @pl.when(has_others)
            def _():
                copy(ring.edge)
                plgpu.barrier_wait(ring.edge)
                for block in (ring.a.at[slot], ring.b.at[slot]):
                    _clear(block, task.start - above, task.stop - above)
                plgpu.commit_smem()
                for _ in range(_COPIES):
                    plgpu.barrier_arrive(ring.ready.at[slot])

            pl.when(~has_others)(lambda: copy(ring.ready.at[slot]))
            return count + 1

        return lax.fori_loop(0, task.steps, step, count)

    def _multiply(self, task: _Task, count: Array, ring: _Ring, out, tiles) -> Array:
        """Sums this warpgroup's half of the block over all rows of the group, and stores it."""
        half, slots = self.blocks.height // 2, self.blocks.slots
        mine = lax.axis_index("warpgroup") * half

        def release(count: Array) -> None:
            plgpu.barrier_arrive(ring.free.at[lax.rem(count, slots)])

        def total(acc) -> Array:
            def step(i: Array, count: Array) -> Array:
                slot = lax.rem(count, slots)
                plgpu.barrier_wait(ring.ready.at[slot])
                left = ring.a.at[slot, :, pl.ds(mine, half)].transpose((1, 0))
                plgpu.wgmma(acc, left, ring.b.at[slot])
                plgpu.wgmma_wait(1)  # the product of the step before this one is complete
                pl.when(i > 0)(lambda: release(count - 1))
                return count + 1

            end = lax.fori_loop(0, task.steps, step, count)
            value = acc[...]  # waits for the last product
            pl.when(task.steps > 0)(lambda: release(end - 1))
            return value

        shape = (half, self.blocks.width)
        value = pl.run_scoped(total, plgpu.ACC(shape, jnp.float32))
        self._store(value, tiles.at[lax.axis_index("warpgroup")], out, task, mine)
        return count + task.steps

    def _store(self, value: Array, tiles, out, task: _Task, mine: Array) -> None:
        """Writes `value` from row `mine` of the block on; what hangs over the edge is dropped."""
        stores, _, lanes = tiles.shape
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        parts = itertools.product(
            range(0, value.shape[0], TILE), range(0, self.blocks.width, lanes)
        )
        for i, (row, column) in enumerate(parts):
            if i >= stores:
                plgpu.wait_smem_to_gmem(stores - 1, wait_read_only=True)
            part = value[row : row + TILE, column : column + lanes]
            tiles[i % stores] = part.astype(self.dtype)
            plgpu.commit_smem()
            rows = pl.ds(task.row + mine + row, TILE)
            columns = pl.ds(task.column + column, lanes)
            plgpu.copy_smem_to_gmem(tiles.at[i % stores], out.at[task.group, rows, columns])
