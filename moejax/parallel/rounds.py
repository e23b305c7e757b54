"""Computes rows where a plan wants them: usually at once, in rounds where there is no room.

A round holds at most R rows per device. More than one keeps no intermediate for the backward pass
and computes each round again there, so that memory stays what one round needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from moejax.kernels import compat
from moejax.types import at_least_f32

OneRound = Callable[[Any, Any, Any], Array]  # (floats, what has no gradient, which round) -> y


def in_rounds(one_round: OneRound, floats: Any, integers: Any, num_rounds: Array) -> Array:
    """The sum of `one_round(floats, integers, n)` over n, differentiable in `floats`.

    `one_round` with None instead of a number is all rounds in one, taken where `num_rounds` is 1.
    Both are collective: `num_rounds` must be the same on all devices.
    """
    return lax.cond(
        num_rounds <= 1,
        lambda f, i, n: one_round(f, i, None),
        functools.partial(_sum_of_rounds, one_round),
        floats,
        integers,
        num_rounds,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_rounds(one_round: OneRound, floats: Any, integers: Any, num_rounds: Array) -> Array:
    shape = jax.eval_shape(lambda f, i: one_round(f, i, 0), floats, integers)
    wide = at_least_f32(shape.dtype)
    like = jax.tree.leaves(floats)[0]
    add = lambda n, y: y + one_round(floats, integers, n).astype(wide)
    return lax.fori_loop(0, num_rounds, add, compat.zeros(shape.shape, wide, like=like)).astype(
        shape.dtype
    )


def _save(one_round, floats, integers, num_rounds):
    y = _sum_of_rounds(one_round, floats, integers, num_rounds)
    return y, (floats, integers, num_rounds)


def _backward(one_round, saved, dy):
    floats, integers, num_rounds = saved

    def add(n: Array, total: Any) -> Any:
        _, pull = jax.vjp(lambda f: one_round(f, integers, n), floats)
        return jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, pull(dy)[0])

    zeros = jax.tree.map(lambda f: compat.zeros(f.shape, at_least_f32(f.dtype), like=f), floats)
    total = lax.fori_loop(0, num_rounds, add, zeros)
    return jax.tree.map(lambda t, f: t.astype(f.dtype), total, floats), None, None


_sum_of_rounds.defvjp(_save, _backward)
