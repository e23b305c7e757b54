"""`routed_tiles.py` as two kernels: every visit of a tile of packed queries to a block they chose.

The grid goes over visits, in the order of the rows. A block's keys and values are fetched once for
all of its visits, and a tile's results stay in VMEM until the last block with rows in it has stored
them there. Scores are computed keys by queries: softmax then adds whole registers up, and what
there is one of per query lies along the lanes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from moejax.kernels.block_attention.tpu.tiles import tile_height
from moejax.kernels.expert_mlp.slots import Slots
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.tpu.visiting import VisitRefs, call, dot, inside, keep
from moejax.kernels.grouped_matmul.visits import visits_of_groups, visits_of_rows
from moejax.types import at_least_f32


def forward(
    q: Float[Array, "T d"],
    k: Float[Array, "J b d"],
    v: Float[Array, "J b dv"],
    slots: Slots,
    *,
    scale: float,
) -> tuple[Float[Array, "R dv"], Float[Array, " R"]]:
    """(result, log-sum-exp) of each row over its block; zero in empty slots."""
    num_rows, num_blocks = slots.order.size, k.shape[0]
    height = _height(q, k, v, slots)
    visits = visits_of_rows(LocalGroups(slots.group_sizes, 0), num_rows, height)
    specs = _Specs(height, num_blocks)
    wide = at_least_f32(q.dtype)
    out, lse = call(
        functools.partial(_attend, height=height, num_blocks=num_blocks, scale=scale),
        visits,
        ((_by_row(q, slots),), (k, v)),
        grid=visits.group.shape,
        semantics=("arbitrary",),
        in_specs=((specs.rows(q),), (specs.block(k), specs.block(v))),
        out_specs=(specs.rows(v), specs.numbers()),
        outs=(
            jax.ShapeDtypeStruct((num_rows, v.shape[2]), v.dtype),
            jax.ShapeDtypeStruct((1, num_rows), wide),
        ),
        sums=(),
        flops=2 * num_rows * k.shape[1] * (k.shape[2] + v.shape[2]),
        transcendentals=num_rows * k.shape[1],
    )
    return out, lse[0]


def backward(
    q: Float[Array, "T d"],
    k: Float[Array, "J b d"],
    v: Float[Array, "J b dv"],
    d_out: Float[Array, "T dv"],
    lse: Float[Array, " T"],
    mean: Float[Array, " T"],
    slots: Slots,
    *,
    scale: float,
) -> tuple[Float[Array, "R d"], Float[Array, "J b d"], Float[Array, "J b dv"]]:
    """(dq by row, dk, dv), the last two in at least float32.

    The gradients of a block's keys and values are added up in VMEM, in the order of the rows, while
    its visits last. A block that nobody chose is visited once and gets 0. Rows of empty slots are
    unspecified, and may be NaN: `Slots.sum_by_token` selects.

    Args:
      q, k, v, slots, scale: as for `forward`.
      d_out: the cotangent of the result over all keys.
      lse: the log-sum-exp over all keys, those of other blocks included.
      mean: the sum over the width of `d_out` times that result.
    """
    num_rows, num_blocks = slots.order.size, k.shape[0]
    height = _height(q, k, v, slots)
    visits = visits_of_groups(LocalGroups(slots.group_sizes, 0), num_rows, height)
    specs = _Specs(height, num_blocks)
    rows, d_out = _by_row(q, slots), _by_row(d_out, slots)
    lse, mean = (_by_row(x, slots)[None] for x in (lse, mean))
    return call(
        functools.partial(_gradients, height=height, scale=scale),
        visits,
        ((rows, d_out), (lse, mean), (k, v)),
        grid=visits.group.shape,
        semantics=("arbitrary",),
        in_specs=(
            (specs.rows(rows), specs.rows(d_out)),
            (specs.numbers(), specs.numbers()),
            (specs.block(k), specs.block(v)),
        ),
        out_specs=(specs.rows(q), specs.block(k), specs.block(v)),
        outs=(
            jax.ShapeDtypeStruct(rows.shape, q.dtype),
            jax.ShapeDtypeStruct(k.shape, at_least_f32(k.dtype)),
            jax.ShapeDtypeStruct(v.shape, at_least_f32(v.dtype)),
        ),
        sums=(),
        flops=2 * num_rows * k.shape[1] * (3 * k.shape[2] + 2 * v.shape[2]),
        transcendentals=num_rows * k.shape[1],
    )


def _height(q: Array, k: Array, v: Array, slots: Slots) -> int:
    return tile_height(
        slots.order.size,
        k.shape[0],
        block_size=k.shape[1],
        width=k.shape[2],
        value_width=v.shape[2],
        itemsize=q.dtype.itemsize,
    )


def _by_row(x: Array, slots: Slots) -> Array:
    """What belongs to the query of each row."""
    return x.at[slots.token()].get(mode="promise_in_bounds")


class _Specs:
    """Which part of an array a visit has in VMEM."""

    def __init__(self, height: int, num_blocks: int):
        self.height, self.num_blocks = height, num_blocks

    def rows(self, x: Array) -> pl.BlockSpec:
        """Of `[R, w]`, as wide as `x`: a tile."""
        return pl.BlockSpec((self.height, x.shape[-1]), lambda v, visits: (visits.tile[v], 0))

    def numbers(self) -> pl.BlockSpec:
        """Of `[1, R]`: those of a tile."""
        return pl.BlockSpec((1, self.height), lambda v, visits: (0, visits.tile[v]))

    def block(self, x: Array) -> pl.BlockSpec:
        """Of `[J, b, w]`: the block, and some block for rows of empty slots."""
        of = lambda v, visits: (jnp.minimum(visits.group[v], self.num_blocks - 1), 0, 0)
        return pl.BlockSpec((None, *x.shape[1:]), of)


def _attend(visits: VisitRefs, queries, block, outs, _, *, height, num_blocks, scale) -> None:
    visit, (rows,), (k, v), (out, lse) = pl.program_id(0), queries, block, outs
    used = visits.has_rows(visit)
    chose = visits.group[visit] < num_blocks
    bounds = visits.rows_in_tile(visit, height)

    @pl.when(used & chose)
    def _():
        # Of a tile on a boundary every row is computed, and no row enters another's result.
        score = dot(k[...], rows[...], (1, 1), dtype=lse.dtype) * scale  # [b, height]
        peak = jnp.max(score, axis=0, keepdims=True)
        weight = jnp.exp(score - peak)
        total = jnp.sum(weight, axis=0, keepdims=True)
        weight = (weight / total).astype(v.dtype)
        result = dot(weight, v[...], (0, 0), dtype=lse.dtype).astype(out.dtype)
        out[...] = jnp.where(inside(out.shape, 0, *bounds), result, out[...])
        lse[...] = jnp.where(inside(lse.shape, 1, *bounds), peak + jnp.log(total), lse[...])

    @pl.when(used & ~chose)
    def _():
        out[...] = jnp.where(inside(out.shape, 0, *bounds), jnp.zeros_like(out), out[...])
        lse[...] = jnp.where(inside(lse.shape, 1, *bounds), jnp.zeros_like(lse), lse[...])


def _gradients(visits: VisitRefs, queries, numbers, block, outs, _, *, height, scale) -> None:
    visit, (k, v), (d_q, d_k, d_v) = pl.program_id(0), block, outs

    @pl.when((visit == 0) | (visits.group[jnp.maximum(visit - 1, 0)] != visits.group[visit]))
    def _():
        d_k[...] = jnp.zeros_like(d_k)
        d_v[...] = jnp.zeros_like(d_v)

    @pl.when(visits.has_rows(visit))
    def _():
        bounds = visits.rows_in_tile(visit, height)
        # A row of another block is zero everywhere: its weights are 1 and add nothing.
        rows, d_out = (keep(x[...], 0, *bounds) for x in queries)
        lse, mean = (keep(x[...], 1, *bounds) for x in numbers)
        score = dot(k[...], rows, (1, 1), dtype=lse.dtype) * scale  # [b, height]
        weight = jnp.exp(score - lse)
        d_v[...] += dot(weight.astype(v.dtype), d_out, (1, 0), dtype=d_v.dtype)
        d_score = weight * (dot(v[...], d_out, (1, 1), dtype=lse.dtype) - mean) * scale
        d_score = d_score.astype(rows.dtype)
        d_k[...] += dot(d_score, rows, (1, 0), dtype=d_k.dtype)
        d_rows = dot(d_score, k[...], (0, 0), dtype=lse.dtype).astype(d_q.dtype)
        d_q[...] = jnp.where(inside(d_q.shape, 0, *bounds), d_rows, d_q[...])
