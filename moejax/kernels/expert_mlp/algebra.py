"""The mathematics of gated experts on rows sorted by expert, forward and backward.

For row r with input x, routing weight s, and the weights of its expert:

    gate = x Wg,  up = x Wu,  a = act(gate, up),  y = (s a) Wd        out[t] = sum of its rows' y

and, with g = dout[token of r] and act' the vector-Jacobian product of act at (gate, up):

    da = g Wd^T,  ds = <da, a>,  (dgate, dup) = act'(s da)
    dWd = sum (s a)^T g,  dWg = sum x^T dgate,  dWu = sum x^T dup     over the rows of an expert
    dx = dgate Wg^T + dup Wu^T                                        dx[t] = sum of its rows' dx

So only x, gate, up and s need saving: a is one elementwise recomputation, y is never needed because
s acts before the down projection (Guo et al., SonicMoE, arXiv 2512.14080). A bias is a weight
matrix with the single input 1 (s for the down projection).

The three products are passed in: plain matmuls for the rows of one expert, grouped ones for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.types import at_least_f32


class Weights(NamedTuple):
    """Leading axis E, absent where they are one expert's. Biases are `[E, 1, width]` or None."""

    gate: Array  # [E, D, F]
    up: Array  # [E, D, F]
    down: Array  # [E, F, D]
    gate_bias: Array | None
    up_bias: Array | None
    down_bias: Array | None


@runtime_checkable
class Products(Protocol):
    """Products of rows with the weights of their experts, accumulated in at least float32."""

    def times(self, rows: Array, weight: Array) -> Array:
        """rows W."""

    def times_transposed(self, rows: Array, weight: Array) -> Array:
        """rows W^T."""

    def outer(self, left: Array, right: Array) -> Array:
        """Sum over each expert's rows of left^T right."""

    def times_both(self, rows: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """(rows Wg, rows Wu)."""

    def times_both_transposed(self, dgate: Array, dup: Array, gate: Array, up: Array) -> Array:
        """dgate Wg^T + dup Wu^T."""

    def outer_both(self, left: Array, dgate: Array, dup: Array) -> tuple[Array, Array]:
        """Sums over each expert's rows of left^T dgate and left^T dup."""


class Activations(NamedTuple):
    """What the forward pass saves besides its inputs."""

    gate: Array  # [R, F]
    up: Array  # [R, F]


def forward(
    x: Array, score: Array, w: Weights, products: Products, act: Callable
) -> tuple[Array, Activations]:
    """(y [R, D], saved pre-activations) for rows `x` [R, D] with routing weights `score` [R]."""
    gate, up = products.times_both(x, w.gate, w.up)
    if w.gate_bias is not None:
        one = jnp.ones_like(x[:, :1])
        gate += products.times(one, w.gate_bias)
        up += products.times(one, w.up_bias)
    a = act(_wide(gate), _wide(up))
    y = products.times((_wide(score)[:, None] * a).astype(x.dtype), w.down)
    if w.down_bias is not None:
        y += products.times(score[:, None].astype(x.dtype), w.down_bias)
    return y, Activations(gate, up)


def backward(
    g: Array, x: Array, score: Array, h: Activations, w: Weights, products: Products, act: Callable
) -> tuple[Array, Array, Weights]:
    """(dx [R, D], dscore [R], dweights) for the cotangent `g` [R, D] of each row's y."""
    s = _wide(score)[:, None]
    a, act_vjp = jax.vjp(act, _wide(h.gate), _wide(h.up))
    da = _wide(products.times_transposed(g, w.down))
    dscore = jnp.sum(da * a, axis=1)
    dgate, dup = (d.astype(x.dtype) for d in act_vjp(s * da))
    dx = products.times_both_transposed(dgate, dup, w.gate, w.up)
    dw_gate, dw_up = products.outer_both(x, dgate, dup)
    dw = Weights(
        gate=dw_gate,
        up=dw_up,
        down=products.outer((s * a).astype(x.dtype), g),
        gate_bias=None,
        up_bias=None,
        down_bias=None,
    )
    if w.gate_bias is not None:
        one = jnp.ones_like(x[:, :1])
        dw = dw._replace(gate_bias=products.outer(one, dgate), up_bias=products.outer(one, dup))
    if w.down_bias is not None:
        dscore += _wide(products.times_transposed(g, w.down_bias))[:, 0]
        dw = dw._replace(down_bias=products.outer(score[:, None].astype(x.dtype), g))
    return dx, dscore, dw


def _wide(x: Array) -> Array:
    return x.astype(at_least_f32(x.dtype))
