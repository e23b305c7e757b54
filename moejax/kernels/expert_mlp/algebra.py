"""The mathematics of gated experts on rows sorted by expert, forward and backward.

For row r with input x, routing weight s, and the weights of its expert:

    gate = x Wg + bg,  up = x Wu + bu,  a = act(gate, up),  y = a Wd + bd
    out[t] = sum of s y over the rows of token t

and, with g = dout[token of r] and act' the vector-Jacobian product of act at (gate, up):

    da = g Wd^T,  ds = <da, a> + <g, bd>,  (dgate, dup) = act'(s da)
    dWd = sum (s a)^T g,  dWg = sum x^T dgate,  dWu = sum x^T dup     over the rows of an expert
    dbd = sum s g,        dbg = sum dgate,      dbu = sum dup         likewise
    dx = dgate Wg^T + dup Wu^T                                        dx[t] = sum of its rows' dx

So only x, gate, up and s need saving: a is one elementwise recomputation, and y is never needed,
because ds follows from da (Guo et al., SonicMoE, arXiv 2512.14080).

The products are passed in: plain matmuls for the rows of one expert, grouped ones for all.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.kernels.activations import GluActivation
from moejax.types import at_least_f32


class Weights(NamedTuple):
    """Leading axis E, absent where they are one expert's."""

    gate: Array  # [E, D, F]
    up: Array  # [E, D, F]
    down: Array  # [E, F, D]
    gate_bias: Array | None  # [E, F]
    up_bias: Array | None  # [E, F]
    down_bias: Array | None  # [E, D]


class Activations(NamedTuple):
    """What the forward pass saves besides its inputs."""

    gate: Array  # [R, F]
    up: Array  # [R, F]


@runtime_checkable
class Products(Protocol):
    """Products of rows with what their experts hold, accumulated in at least float32."""

    def times(self, rows: Array, weight: Array) -> Array:
        """rows W."""

    def times_transposed(self, rows: Array, weight: Array) -> Array:
        """rows W^T."""

    def outer(self, left: Array, right: Array) -> Array:
        """Sum over each expert's rows of left^T right."""

    def spread(self, values: Array, like: Array) -> Array:
        """The expert's `values` for every row of `like`."""

    def total(self, rows: Array) -> Array:
        """Sum over each expert's rows."""

    def glu(self, rows: Array, w: Weights, act: GluActivation) -> tuple[Array, Array, Array]:
        """(gate, up, act(gate, up)), act in at least float32 on gate and up as returned."""

    def times_both_transposed(self, dgate: Array, dup: Array, gate: Array, up: Array) -> Array:
        """dgate Wg^T + dup Wu^T."""

    def outer_both(self, left: Array, dgate: Array, dup: Array) -> tuple[Array, Array]:
        """Sums over each expert's rows of left^T dgate and left^T dup."""


def forward(
    x: Array, w: Weights, products: Products, act: GluActivation
) -> tuple[Array, Activations]:
    """(y [R, D], saved pre-activations) for rows `x` [R, D]."""
    gate, up, a = products.glu(x, w, act)
    y = products.times(a, w.down)
    if w.down_bias is not None:
        y += products.spread(w.down_bias, y)
    return y, Activations(gate, up)


def backward(
    g: Array,
    x: Array,
    score: Array,
    h: Activations,
    w: Weights,
    products: Products,
    act: GluActivation,
) -> tuple[Array, Array, Weights]:
    """(dx [R, D], dscore [R], dweights) for rows `x` with routing weights `score` [R].

    `g` [R, D] is the cotangent of each row's s y.
    """
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
        dw = dw._replace(gate_bias=products.total(dgate), up_bias=products.total(dup))
    if w.down_bias is not None:
        dscore += jnp.sum(_wide(g) * _wide(products.spread(w.down_bias, g)), axis=1)
        dw = dw._replace(down_bias=products.total((s * _wide(g)).astype(x.dtype)))
    return dx, dscore, dw


def _wide(x: Array) -> Array:
    return x.astype(at_least_f32(x.dtype))
