"""Declares what an adapter adds, in the collection `lora`."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

ADAPTERS = "lora"


def adapter_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> Array:
    """The leaf `name` of a compact module; float32 and drawn by `init` when it is fresh.

    As `module.param` would, but outside `params`, and after it: the parameters of the projection
    are drawn as they are without an adapter.
    """
    boxed = nn.with_logical_partitioning(init, axes)
    draw = lambda: boxed(module.make_rng("params"), shape, jnp.float32)
    return module.variable(ADAPTERS, name, draw).value


def adapter_value(module: nn.Module, name: str) -> Array:
    """A leaf that exists, of a bound module outside its compact method."""
    return nn.meta.unbox(module.get_variable(ADAPTERS, name))
