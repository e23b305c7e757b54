"""Gated experts over all rows at once, on the three grouped products of one implementation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import jax.numpy as jnp
from jax import Array

from moejax.kernels.expert_mlp import algebra
from moejax.kernels.expert_mlp.algebra import Activations, Weights
from moejax.kernels.expert_mlp.slots import Slots
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.types import at_least_f32


class GroupedExperts:
    """`forward` and `backward` on a module of grouped products, e.g. `grouped_matmul.xla`."""

    def __init__(self, kernels: ModuleType):
        self._kernels = kernels

    def forward(
        self, x: Array, score: Array, w: Weights, slots: Slots, act: Callable
    ) -> tuple[Array, Activations]:
        """(y [R, D], saved pre-activations [R, F]) for tokens `x` [T, D], `score` [R]."""
        products = _Grouped(self._kernels, slots)
        return algebra.forward(_gather(x, slots), score, w, products, act)

    def backward(
        self,
        dout: Array,
        x: Array,
        score: Array,
        h: Activations,
        w: Weights,
        slots: Slots,
        act: Callable,
    ) -> tuple[Array, Array, Weights]:
        """(dx by row [R, D], dscore [R], dweights) for the cotangent `dout` [T, D]."""
        products = _Grouped(self._kernels, slots)
        rows, g = _gather(x, slots), _gather(dout, slots)
        return algebra.backward(g, rows, score, h, w, products, act)


class _Grouped:
    """Products of all rows with the weights of their experts."""

    def __init__(self, kernels: ModuleType, slots: Slots):
        self._kernels = kernels
        self._groups = LocalGroups(slots.group_sizes, 0)

    def times(self, rows: Array, weight: Array) -> Array:
        return self._kernels.forward(
            rows, weight, self._groups, transpose_rhs=False, dtype=rows.dtype
        )

    def times_transposed(self, rows: Array, weight: Array) -> Array:
        return self._kernels.grad_lhs(
            rows, weight, self._groups, transpose_rhs=False, dtype=rows.dtype
        )

    def outer(self, left: Array, right: Array) -> Array:
        return self._kernels.grad_rhs(
            left, right, self._groups, transpose_rhs=False, dtype=at_least_f32(left.dtype)
        )

    def times_both(self, rows: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        return self.times(rows, gate), self.times(rows, up)

    def times_both_transposed(self, dgate: Array, dup: Array, gate: Array, up: Array) -> Array:
        return self.times_transposed(dgate, gate) + self.times_transposed(dup, up)

    def outer_both(self, left: Array, dgate: Array, dup: Array) -> tuple[Array, Array]:
        return self.outer(left, dgate), self.outer(left, dup)


def _gather(values: Array, slots: Slots) -> Array:
    """`values` `[T, D]` of each row's token; 0 in rows of empty slots. `[R, D]`."""
    used = jnp.arange(slots.order.size, dtype=jnp.int32) < jnp.sum(slots.group_sizes)
    rows = values.at[slots.token()].get(mode="promise_in_bounds")
    return jnp.where(used[:, None], rows, 0)
