"""Gated experts over all rows at once, on grouped products, each by its own implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax.kernels.activations import GluActivation
from moejax.kernels.expert_mlp import algebra
from moejax.kernels.expert_mlp.algebra import Activations, Weights
from moejax.kernels.expert_mlp.slots import Slots
from moejax.kernels.grouped_matmul import implementations
from moejax.kernels.grouped_matmul.groups import LocalGroups


class GroupedExperts:
    """`forward` and `backward` on the products that `choice` names."""

    def __init__(self, choice: implementations.Choice):
        self._choice = choice

    def forward(
        self, x: Array, w: Weights, slots: Slots, act: GluActivation
    ) -> tuple[Array, Activations]:
        """(y [R, D], saved pre-activations [R, F]) for tokens `x` [T, D]."""
        products = _Grouped(self._choice, slots)
        return algebra.forward(_gather(x, slots), w, products, act)

    def backward(
        self,
        dout: Array,
        x: Array,
        score: Array,
        h: Activations,
        w: Weights,
        slots: Slots,
        act: GluActivation,
    ) -> tuple[Array, Array, Weights]:
        """(dx by row [R, D], dscore [R], dweights) for the cotangent `dout` [T, D]."""
        products = _Grouped(self._choice, slots)
        rows, g = _gather(x, slots), _gather(dout, slots)
        return algebra.backward(g, rows, score, h, w, products, act)


class _Grouped:
    """Products of all rows with the weights of their experts."""

    def __init__(self, choice: implementations.Choice, slots: Slots):
        self._forward = implementations.module(choice.forward).forward
        self._grad_lhs = implementations.module(choice.grad_lhs).grad_lhs
        self._grad_rhs = implementations.module(choice.grad_rhs).grad_rhs
        self._choice = choice
        self._groups = LocalGroups(slots.group_sizes, 0)

    def times(self, rows: Array, weight: Array) -> Array:
        return self._forward(rows, weight, self._groups, transpose_rhs=False, dtype=rows.dtype)

    def times_transposed(self, rows: Array, weight: Array) -> Array:
        return self._grad_lhs(rows, weight, self._groups, transpose_rhs=False, dtype=rows.dtype)

    def outer(self, left: Array, right: Array) -> Array:
        return self._grad_rhs(left, right, self._groups, transpose_rhs=False, dtype=left.dtype)

    def spread(self, values: Array, like: Array) -> Array:
        return self._groups.of_rows(values, like.shape[0]).astype(like.dtype)

    def total(self, rows: Array) -> Array:
        return self.outer(jnp.ones_like(rows[:, :1]), rows)[:, 0]

    def glu(self, rows: Array, w: Weights, act: GluActivation) -> tuple[Array, Array, Array]:
        biases = None if w.gate_bias is None else (w.gate_bias, w.up_bias)
        return implementations.glu(
            self._choice.glu, rows, w.gate, w.up, biases, self._groups, act=act
        )

    def times_both_transposed(self, dgate: Array, dup: Array, gate: Array, up: Array) -> Array:
        return implementations.grad_rows_of_glu(
            self._choice.grad_lhs, dgate, dup, gate, up, self._groups
        )

    def outer_both(self, left: Array, dgate: Array, dup: Array) -> tuple[Array, Array]:
        return self.outer(left, dgate), self.outer(left, dup)


def _gather(values: Array, slots: Slots) -> Array:
    """`values` `[T, D]` of each row's token; 0 in rows of empty slots. `[R, D]`."""
    used = jnp.arange(slots.order.size, dtype=jnp.int32) < jnp.sum(slots.group_sizes)
    rows = values.at[slots.token()].get(mode="promise_in_bounds")
    return jnp.where(used[:, None], rows, 0)
