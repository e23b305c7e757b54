"""A linear projection: the prototype that adapters replace.

Attention and MLPs hold one unbound `linear` and `copy` it for every projection, so that a LoRA
or any other adapter is put in by swapping that one prototype. An adapter that multiplies every
token by the same matrix says which in a method `matrix`, as `Linear` does: see `matrix_of`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels import mixed_precision
from moejax.types import Context

fan_in_normal = initializers.variance_scaling(1.0, "fan_in", "normal")


def set_by_owner(default: Any) -> Any:
    """A field that whoever copies the prototype sets; a config that sets it is refused."""
    return dataclasses.field(default=default, metadata={"set_by_owner": True})


class Linear(nn.Module):
    """`y = x W + b`, computed in the dtype of `x`.

    Attributes:
      features: output width. Set by the owner of the prototype, in every copy.
      use_bias: whether there is a bias, initialised to 0. Set by the owner.
      kernel_init: initialiser of the kernel `[in, out]`; normal with variance `1 / in` by default.
      axes: logical names of the kernel's two axes, for sharding. Set by the owner.
    """

    features: int = set_by_owner(0)
    use_bias: bool = set_by_owner(False)
    kernel_init: nn.initializers.Initializer = fan_in_normal
    axes: tuple[str | None, str | None] = set_by_owner((None, None))

    @nn.compact
    def __call__(self, x: Float[Array, "... K"], context: Context) -> Float[Array, "... N"]:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = mixed_precision.matmul(x, kernel)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(initializers.zeros, self.axes[1:])
            bias = self.param("bias", zeros, (self.features,), jnp.float32)
            y = mixed_precision.add_bias(y, bias)
        return y

    def matrix(self, dtype: Any) -> Float[Array, "K N"]:
        """W, of a module whose parameters exist."""
        return jnp.asarray(nn.meta.unbox(self.get_variable("params", "kernel")), dtype)


def is_target(module: nn.Module, *projection: str) -> bool:
    """Whether the adapter `module` is for the place where it is, or for a projection of its own.

    Its field `targets` names paths within the layer, None every one.
    """
    return module.targets is None or "/".join((*module.path, *projection)) in module.targets


def matrix_of(linear: nn.Module, dtype: Any) -> Float[Array, "K N"]:
    """The W of a bound projection `x W`, for a caller that multiplies in another order.

    Raises UserError where the class that defines `__call__` defines no `matrix` beside it: one that
    is inherited would be that of another product.
    """
    owner = next(cls for cls in type(linear).__mro__ if "__call__" in vars(cls))
    if "matrix" not in vars(owner):
        raise UserError(
            f"{type(linear).__name__} defines no method matrix(dtype): the projection "
            f"{linear.name!r} is multiplied in another order here, which needs the one matrix that "
            "every token is multiplied by"
        )
    return linear.matrix(dtype)
