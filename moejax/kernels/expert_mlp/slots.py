"""Permutes between tokens and rows sorted by expert. Gathers in both directions, no scatter-add.

A *slot* is one (token, choice) pair; slot i belongs to token i // K. Sorting the slots by expert
(stably, so by token within an expert) gives the *rows*; empty slots come last.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moejax.types import at_least_f32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where every slot lies among the sorted rows.

    Attributes:
      order: the slot of each row.
      row: the row of each slot.
      group_sizes: rows per expert.
    """

    order: Int[Array, " R"]
    row: Int[Array, "T K"]
    group_sizes: Int[Array, " E"]

    def token(self) -> Int[Array, " R"]:
        """The token of each row."""
        return self.order // self.row.shape[1]

    def filled(self) -> Bool[Array, "T K"]:
        """Which slots name an expert: their rows come before those of the empty slots."""
        return self.row < jnp.sum(self.group_sizes)

    def to_rows(self, slots: Array) -> Array:
        """`[T, K]` values in the order of the rows; 0 in rows of empty slots."""
        used = jnp.arange(self.order.size, dtype=jnp.int32) < jnp.sum(self.group_sizes)
        return jnp.where(used, _take(slots.reshape(-1), self.order), 0)

    def from_rows(self, rows: Array) -> Array:
        """`[R]` values in the order of the slots, `[T, K]`; 0 in empty slots."""
        return jnp.where(self.filled(), _take(rows, self.row), 0)

    def sum_by_token(self, rows: Array, dtype, *, weights: Array | None = None) -> Array:
        """Sums each token's rows `[R, D]`, times `weights` `[T, K]`, in at least float32; `[T, D]`.

        The weight of an empty slot may be NaN.
        """
        acc = at_least_f32(rows.dtype if weights is None else jnp.result_type(rows, weights))
        filled = self.filled()

        def choice(k: int) -> Array:
            value = _take(rows, self.row[:, k]).astype(acc)
            if weights is not None:
                value = value * weights[:, k, None].astype(acc)
            return jnp.where(filled[:, k, None], value, 0)

        # One gather per choice: several times faster on CPU than one [T, K, D] gather and a sum.
        total = choice(0)
        for k in range(1, self.row.shape[1]):
            total = total + choice(k)
        return total.astype(dtype)


def sort_slots(experts: Int[Array, "T K"], num_experts: int) -> Slots:
    """Sorts slots by expert. An id outside `[0, num_experts)` is an empty slot."""
    num_rows = experts.size
    ids = experts.reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts).astype(jnp.int32)
    slot = jnp.arange(num_rows, dtype=jnp.int32)
    sorted_ids, order = lax.sort_key_val(ids, slot, is_stable=True)
    bounds = jnp.searchsorted(sorted_ids, jnp.arange(num_experts + 1, dtype=jnp.int32))
    row = jnp.zeros_like(slot).at[order].set(slot, unique_indices=True)
    return Slots(
        order=order,
        row=row.reshape(experts.shape),
        group_sizes=jnp.diff(bounds).astype(jnp.int32),
    )


@jax.custom_vjp
def rows_of_tokens(x: Float[Array, "T D"], slots: Slots) -> Float[Array, "R D"]:
    """Each row's token. Rows of empty slots hold some token too; their cotangent is ignored."""
    return _take(x, slots.token())


rows_of_tokens.defvjp(
    lambda x, slots: (rows_of_tokens(x, slots), slots),
    lambda slots, drows: (slots.sum_by_token(drows, drows.dtype), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tokens_of_rows(rows: Float[Array, "R D"], slots: Slots, dtype: Any) -> Float[Array, "T D"]:
    """The sum of each token's rows, added in at least float32; rows of empty slots count nothing.

    The transpose of `rows_of_tokens`, and like it made of gathers alone.
    """
    return slots.sum_by_token(rows, dtype)


def _sum_rows(rows, slots, dtype):
    return tokens_of_rows(rows, slots, dtype), (slots, jnp.zeros((), rows.dtype))


def _spread_to_rows(dtype, saved, dy):
    slots, like = saved
    used = jnp.arange(slots.order.size, dtype=jnp.int32) < jnp.sum(slots.group_sizes)
    return jnp.where(used[:, None], _take(dy, slots.token()), 0).astype(like.dtype), None


tokens_of_rows.defvjp(_sum_rows, _spread_to_rows)


def _take(values: Array, index: Array) -> Array:
    return values.at[index].get(mode="promise_in_bounds")
