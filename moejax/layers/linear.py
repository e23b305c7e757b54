"""A linear projection: the prototype that adapters replace.

Attention and MLPs hold one unbound `linear` and `copy` it for every projection, so that a LoRA
or any other adapter is put in by swapping that one prototype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.kernels import compat
from moejax.types import Context

fan_in_normal = initializers.variance_scaling(1.0, "fan_in", "normal")


def _set_by_owner(default: Any) -> Any:
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

    features: int = _set_by_owner(0)
    use_bias: bool = _set_by_owner(False)
    kernel_init: nn.initializers.Initializer = fan_in_normal
    axes: tuple[str | None, str | None] = _set_by_owner((None, None))

    @nn.compact
    def __call__(self, x: Float[Array, "... K"], context: Context) -> Float[Array, "... N"]:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = compat.matmul(x, kernel.astype(x.dtype))
        if self.use_bias:
            zeros = nn.with_logical_partitioning(initializers.zeros, self.axes[1:])
            y = y + self.param("bias", zeros, (self.features,), jnp.float32).astype(x.dtype)
        return y
