"""All parts of an array on every device, with gradients that are added wide."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jaxtyping import Array

from moejax.types import at_least_f32


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: Array, axis_name: str, axis: int) -> Array:
    """The parts `x` of all devices of the mesh axis, one behind the other along `axis`.

    Cotangents are added over the devices in at least float32, where the transpose of
    `lax.all_gather` would add them in the dtype of `x`.
    """
    return lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _forward(x: Array, axis_name: str, axis: int) -> tuple[Array, None]:
    return gathered(x, axis_name, axis), None


def _backward(axis_name: str, axis: int, _: None, cotangent: Array) -> tuple[Array]:
    wide = cotangent.astype(at_least_f32(cotangent.dtype))
    own = lax.psum_scatter(wide, axis_name, scatter_dimension=axis, tiled=True)
    return (own.astype(cotangent.dtype),)


gathered.defvjp(_forward, _backward)
