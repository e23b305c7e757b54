"""Rows times the matrices of their groups: forward, `grad_lhs`, and what the GLU is built on.

The grid goes over blocks of columns, visits, and blocks of the contracted dimension, innermost. A
tile that several groups share is visited by one after another, so its block of the result stays in
VMEM until the last of them has stored its rows there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.tpu.blocks import Blocks, Footprint, blocks_over_rows
from moejax.kernels.grouped_matmul.tpu.visiting import VisitRefs, call, dot, inside, keep
from moejax.kernels.grouped_matmul.visits import visits_of_rows
from moejax.types import at_least_f32


def forward(lhs: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """out[r] = lhs[r] @ rhs[group of r] (its transpose if `transpose_rhs`); `[R, N]`."""
    product = RowProducts(
        terms=(Term(rows=0, weight=0, sum=0),),
        transpose_weights=transpose_rhs,
        finish=lambda sums, biases: sums,
        dtypes=(dtype,),
    )
    return multiply(product, (lhs,), (rhs,), (), groups)[0]


def grad_lhs(dout: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """dlhs[r] = dout[r] @ rhs[group of r].T; `[R, K]`."""
    return forward(dout, rhs, groups, transpose_rhs=not transpose_rhs, dtype=dtype)


class Term(NamedTuple):
    """One product: which rows times which weight is added to which sum."""

    rows: int
    weight: int
    sum: int


@dataclasses.dataclass(frozen=True)
class RowProducts:
    """What a kernel over rows computes.

    Attributes:
      terms: the products; sums are numbered from 0 without a gap.
      transpose_weights: weights are `[G, N, K]` and not `[G, K, N]`.
      finish: maps blocks of the complete sums, and of the group's biases, to those of the results.
      dtypes: of the results.
    """

    terms: tuple[Term, ...]
    transpose_weights: bool
    finish: Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]]
    dtypes: tuple[Any, ...]


def multiply(
    products: RowProducts,
    rows: tuple[Array, ...],
    weights: tuple[Array, ...],
    biases: tuple[Array, ...],
    groups: LocalGroups,
) -> tuple[Array, ...]:
    """The results of `products`, each `[R, N]`; zero in rows of no group.

    Args:
      products: what is computed.
      rows: each `[R, K]`.
      weights: each `[G, K, N]`, or `[G, N, K]` if `products.transpose_weights`.
      biases: each `[G, 1, N]`.
      groups: of the rows.
    """
    (num_rows, inner), num_groups = rows[0].shape, weights[0].shape[0]
    outer = weights[0].shape[1 if products.transpose_weights else 2]
    acc = at_least_f32(jnp.result_type(*rows, *weights))
    num_sums = 1 + max(term.sum for term in products.terms)
    footprint = Footprint(
        rows=sum(x.dtype.itemsize for x in rows),
        weights=sum(w.dtype.itemsize for w in weights),
        results=sum(jnp.dtype(dtype).itemsize for dtype in products.dtypes),
        sums=num_sums * acc.itemsize,
    )
    blocks = blocks_over_rows(num_rows, num_groups, inner, outer, footprint)
    visits = visits_of_rows(groups, num_rows, blocks.rows)
    of_rows, of_weights, of_biases, of_results = _specs(products, blocks, num_groups)
    return call(
        _kernel(products, blocks, num_groups, inner),
        visits,
        (rows, weights, biases),
        grid=(pl.cdiv(outer, blocks.outer), visits.group.shape[0], pl.cdiv(inner, blocks.inner)),
        semantics=("parallel", "arbitrary", "arbitrary"),
        in_specs=(
            (of_rows,) * len(rows),
            (of_weights,) * len(weights),
            (of_biases,) * len(biases),
        ),
        out_specs=(of_results,) * len(products.dtypes),
        outs=tuple(jax.ShapeDtypeStruct((num_rows, outer), dtype) for dtype in products.dtypes),
        sums=(jax.ShapeDtypeStruct((blocks.rows, blocks.outer), acc),) * num_sums,
        flops=2 * len(products.terms) * num_rows * inner * outer,
    )


def _specs(products: RowProducts, blocks: Blocks, num_groups: int) -> tuple[pl.BlockSpec, ...]:
    """Blocks of rows, weights, biases and results at each step (column, visit, k) of the grid."""
    # Visits of rows of nobody have the id G: whichever block they fetch is not used.
    group = lambda visit, visits: jnp.minimum(visits.group[visit], num_groups - 1)
    if products.transpose_weights:
        weights = pl.BlockSpec(
            (None, blocks.outer, blocks.inner), lambda n, v, k, visits: (group(v, visits), n, k)
        )
    else:
        weights = pl.BlockSpec(
            (None, blocks.inner, blocks.outer), lambda n, v, k, visits: (group(v, visits), k, n)
        )
    return (
        pl.BlockSpec((blocks.rows, blocks.inner), lambda n, v, k, visits: (visits.tile[v], k)),
        weights,
        pl.BlockSpec((None, 1, blocks.outer), lambda n, v, k, visits: (group(v, visits), 0, n)),
        pl.BlockSpec((blocks.rows, blocks.outer), lambda n, v, k, visits: (visits.tile[v], n)),
    )


def _kernel(
    products: RowProducts, blocks: Blocks, num_groups: int, inner: int
) -> Callable[..., None]:
    def kernel(visits: VisitRefs, rows, weights, biases, outs, sums):
        visit, step = pl.program_id(1), pl.program_id(2)
        used = visits.has_rows(visit)
        held = visits.group[visit] < num_groups
        last = step == pl.num_programs(2) - 1

        @pl.when(step == 0)
        def _():
            for total in sums:
                total[...] = jnp.zeros_like(total)

        @pl.when(used & held)
        def _():
            _add(products, rows, weights, sums, step=step, inner=inner)

        def store(results):
            own = inside(outs[0].shape, 0, *visits.rows_in_tile(visit, blocks.rows))
            for out, result in zip(outs, results, strict=True):
                out[...] = jnp.where(own, result.astype(out.dtype), out[...])

        @pl.when(used & held & last)
        def _():
            store(products.finish(tuple(s[...] for s in sums), tuple(b[...] for b in biases)))

        @pl.when(used & ~held & last)
        def _():
            store(tuple(jnp.zeros(out.shape, out.dtype) for out in outs))

    return kernel


def _add(products: RowProducts, rows, weights, sums, *, step: Array, inner: int) -> None:
    """Adds the products of one block of the contracted dimension, `inner` wide in all."""
    contracted = 1 if products.transpose_weights else 0
    rows, weights = [ref[...] for ref in rows], [ref[...] for ref in weights]
    width = rows[0].shape[1]
    if inner % width:  # the last block hangs over the edge
        left = inner - step * width
        rows = [keep(block, 1, 0, left) for block in rows]
        weights = [keep(block, contracted, 0, left) for block in weights]
    for term in products.terms:
        total = sums[term.sum]
        total[...] += dot(rows[term.rows], weights[term.weight], (1, contracted), dtype=total.dtype)
