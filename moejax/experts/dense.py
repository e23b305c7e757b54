"""A dense gated MLP: the feed-forward of dense layers, and the shared expert of MoE layers.

Shazeer, arXiv 2002.05202; shared experts: DeepSeekMoE, arXiv 2401.06066; the sigmoid gate on a
shared expert: Qwen2-MoE, arXiv 2407.10671.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from moejax.kernels.activations import glu_activation
from moejax.layers.linear import Linear
from moejax.types import Context


class DenseGLU(nn.Module):
    """down(activation(gate(x), up(x))) for every token, times sigmoid(gate_x . x) if `gated`.

    Attributes:
      d_ff: hidden width F.
      activation: `silu`, `gelu` or `swiglu_clamped`.
      use_bias: biases on the three projections.
      gated: scale the output by one learned sigmoid per token (Qwen2-MoE's shared expert).
      linear: prototype of the projections; adapters replace it.
    """

    d_ff: int
    activation: str = "silu"
    use_bias: bool = False
    gated: bool = False
    linear: nn.Module = dataclasses.field(default_factory=Linear)

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], context: Context) -> Float[Array, "... D"]:
        def project(name: str, features: int, axes: tuple[str, str], value: Array) -> Array:
            linear = self.linear.copy(
                features=features, use_bias=self.use_bias, axes=axes, name=name
            )
            return linear(value, context)

        gate = project("gate", self.d_ff, ("embed", "mlp"), x)
        up = project("up", self.d_ff, ("embed", "mlp"), x)
        hidden = glu_activation(self.activation)(gate, up)
        y = project("down", x.shape[-1], ("mlp", "embed"), hidden)
        if self.gated:
            scale = self.linear.copy(features=1, axes=("embed", None), name="shared_gate")
            y = y * jax.nn.sigmoid(scale(x, context))
        return y


def example() -> DenseGLU:
    """A small instance, for the contract tests."""
    return DenseGLU(d_ff=8, gated=True)
