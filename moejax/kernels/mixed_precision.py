"""Products of narrow activations and wide parameters, whose gradients stay wide.

`x @ w.astype(x.dtype)` also rounds the gradient of w: every device's share is rounded before the
shares are summed, and that sum is rounded again. Here activations and products have the dtype of
x, and the gradient of a parameter is accumulated, summed over devices and returned in the
parameter's own. Without gradient (a frozen w) nothing is kept for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from moejax.kernels import compat
from moejax.types import at_least_f32


def matmul(
    x: Float[Array, "... K"], w: Float[Array, "K N"], *, preferred_element_type: Any = None
) -> Float[Array, "... N"]:
    """`x w`, with w rounded to the dtype of x; the result's dtype is x's or the preferred one."""
    x, w = compat.vary_alike((jnp.asarray(x), jnp.asarray(w)))
    return _matmul(jnp.dtype(preferred_element_type or x.dtype), x, w)


def add_bias(y: Float[Array, "... N"], bias: Float[Array, " N"]) -> Float[Array, "... N"]:
    """`y + bias`, with the bias rounded to the dtype of y."""
    return _add_bias(*compat.vary_alike((y, bias)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(dtype: Any, x: Array, w: Array) -> Array:
    return _product(x, w.astype(x.dtype), 0, dtype)


def _matmul_fwd(dtype, x, w):
    # The rounded w is kept, as the product has it: rounded again it would be gathered again, too.
    rounded = w.value.astype(x.value.dtype)
    y = _product(x.value, rounded, 0, dtype)
    empty = compat.zeros((0,), w.value.dtype, like=w.value)  # its dtype
    return y, (x.value if w.perturbed else None, rounded if x.perturbed else None, empty)


def _matmul_bwd(dtype, residuals, g):
    del dtype
    x, w, empty = residuals
    dx = None if w is None else _product(g, w, 1, w.dtype)
    dw = None if x is None else _outer(x, g, at_least_f32(empty.dtype)).astype(empty.dtype)
    return dx, dw


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def _product(x: Array, w: Array, axis: int, dtype: Any) -> Array:
    """x's last axis times w's `axis`."""
    if _merge_leading_axes(x):
        y = _product(x.reshape(-1, x.shape[-1]), w, axis, dtype)
        return y.reshape(*x.shape[:-1], -1)
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, w, dims, preferred_element_type=dtype)


def _outer(x: Array, g: Array, dtype: Any) -> Array:
    """`[K, N]`, the sum over all leading axes of the outer products of x and g."""
    if _merge_leading_axes(x):
        x, g = (v.reshape(-1, v.shape[-1]) for v in (x, g))
    leading = tuple(range(x.ndim - 1))
    return lax.dot_general(x, g, ((leading, leading), ((), ())), preferred_element_type=dtype)


def _merge_leading_axes(x: Array) -> bool:
    """Whether `[B, S, K]` should be multiplied as `[B S, K]`.

    On CPU, where for the gradient of w XLA otherwise writes a transposed copy of the cotangent, and
    computes whatever produced it a second time for that copy (attention layers ran 1.17 to 1.20
    times as long). Not elsewhere: merging two sharded axes would gather them.
    """
    return x.ndim > 2 and compat.target_platform() == "cpu"


@jax.custom_vjp
def _add_bias(y: Array, bias: Array) -> Array:
    return y + bias.astype(y.dtype)


def _add_bias_fwd(y, bias):
    return _add_bias(y, bias), compat.zeros((0,), bias.dtype, like=bias)


def _add_bias_bwd(empty, g):
    leading = tuple(range(g.ndim - 1))
    return g, jnp.sum(g, leading, dtype=at_least_f32(empty.dtype)).astype(empty.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)
