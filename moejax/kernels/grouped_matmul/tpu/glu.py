"""Gate, up and their activation in one pass over the rows, and the rows' gradient in another.

A tile of rows in VMEM meets the group's block of both matrices, and the activation is computed from
the two sums before they leave VMEM: nothing of width 2F exists, and nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jax import Array, lax

from moejax.kernels import activations
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.tpu.rows import RowProducts, Term, multiply
from moejax.types import at_least_f32


def glu(
    rows: Array,
    gate: Array,
    up: Array,
    biases: tuple[Array, Array] | None,
    groups: LocalGroups,
    *,
    act: activations.GluActivation,
) -> tuple[Array, Array, Array]:
    """(rows Wg + bg, rows Wu + bu, act of both), each `[R, F]` in the dtype of `rows`.

    The activation acts in float32 on the pre-activations as they are returned. Rows of no group are
    zero in all three.

    Args:
      rows: `[R, D]`.
      gate, up: the groups' matrices, `[G, D, F]`.
      biases: None, or `[G, F]` for gate and up.
      groups: of the rows.
      act: elementwise; Mosaic must know its operations.
    """
    products = RowProducts(
        terms=(Term(rows=0, weight=0, sum=0), Term(rows=0, weight=1, sum=1)),
        transpose_weights=False,
        finish=_finish(_FOR_MOSAIC.get(act, act), rows.dtype),
        dtypes=(rows.dtype,) * 3,
    )
    biases = tuple(b[:, None, :] for b in biases or ())
    return multiply(products, (rows,), (gate, up), biases, groups)


def grad_rows_of_glu(
    dgate: Array, dup: Array, gate: Array, up: Array, groups: LocalGroups, *, dtype
) -> Array:
    """dgate Wg^T + dup Wu^T in one sum, `[R, D]`, for `dgate` and `dup` `[R, F]`.

    Rows of no group are zero.
    """
    products = RowProducts(
        terms=(Term(rows=0, weight=0, sum=0), Term(rows=1, weight=1, sum=0)),
        transpose_weights=True,
        finish=lambda sums, biases: sums,
        dtypes=(dtype,),
    )
    return multiply(products, (dgate, dup), (gate, up), (), groups)[0]


def _finish(act: activations.GluActivation, dtype) -> Callable[..., tuple[Array, ...]]:
    wide = at_least_f32(dtype)

    def finish(sums, biases):
        if biases:
            sums = tuple(s + b.astype(wide) for s, b in zip(sums, biases, strict=True))
        gate, up = (s.astype(dtype) for s in sums)
        return gate, up, act(gate.astype(wide), up.astype(wide))

    return finish


def _gelu(gate: Array, up: Array) -> Array:
    """`activations.gelu` by erf: Mosaic has no erfc, by which `jax.nn.gelu` computes it."""
    return 0.5 * gate * (1 + lax.erf(gate * math.sqrt(0.5))) * up


_FOR_MOSAIC = {activations.gelu: _gelu}
