"""Gated linear unit experts: SwiGLU (Mixtral, OLMoE, Qwen3, DeepSeek) and gpt-oss's clamped one.

Shazeer, arXiv 2002.05202: down(activation(gate(x)) * up(x)), computed by `kernels.expert_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array

from moejax.kernels.expert_mlp import Biases, expert_mlp
from moejax.parallel.sharding import Names, once

# Experts are the batch axis: every expert is initialised like a dense layer of its own.
_fan_in = initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))


class GLU(nn.Module):
    """E experts of width F with stacked weights.

    Attributes:
      d_ff: width F of one expert.
      activation: `silu`, `gelu` or `swiglu_clamped` (gpt-oss).
      use_bias: biases on gate, up and down.
      implementation: of `kernels.expert_mlp`; None picks one that has passed its tests.
      down_init: initialiser of the down projection `[E, F, D]`.

    Called as `experts(num_experts, d_model) -> (weights, axes, compute)`, the three things that a
    transport needs: a pytree of weights with a leading expert axis, the logical axes of each, and
    the pure function `compute(rows [R, D], local_ids [R, K], gate [R, K], weights) -> [R, D]`. With
    parts of the weights along `expert_mlp` it gives a part of the result, and the parts add up.
    """

    d_ff: int
    activation: str = "silu"
    use_bias: bool = False
    implementation: str | None = None
    down_init: nn.initializers.Initializer = _fan_in

    @nn.compact
    def __call__(
        self, num_experts: int, d_model: int
    ) -> tuple[Any, dict[str, Names], Callable[..., Array]]:
        e, d, f = num_experts, d_model, self.d_ff
        into, out_of = (
            ("expert", "expert_embed", "expert_mlp"),
            ("expert", "expert_mlp", "expert_embed"),
        )
        zeros = initializers.zeros
        forms = {
            "gate": (_fan_in, (e, d, f), into),
            "up": (_fan_in, (e, d, f), into),
            "down": (self.down_init, (e, f, d), out_of),
        }
        if self.use_bias:
            forms["gate_bias"] = (zeros, (e, f), ("expert", "expert_mlp"))
            forms["up_bias"] = (zeros, (e, f), ("expert", "expert_mlp"))
            forms["down_bias"] = (zeros, (e, d), ("expert", "expert_embed"))
        weights = {
            name: self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)
            for name, (init, shape, names) in forms.items()
        }
        return weights, {name: names for name, (_, _, names) in forms.items()}, self.compute

    def compute(self, rows: Array, local_ids: Array, gate: Array, weights: Any) -> Array:
        """The weighted sum of the chosen experts' outputs for each row `[R, D]`."""
        w = {name: value.astype(rows.dtype) for name, value in weights.items()}
        biases = None
        if self.use_bias:
            biases = Biases(
                gate=w["gate_bias"], up=w["up_bias"], down=once(w["down_bias"], "expert_mlp")
            )
        return expert_mlp(
            rows,
            w["gate"],
            w["up"],
            w["down"],
            local_ids,
            gate,
            biases=biases,
            activation=self.activation,
            implementation=self.implementation,
        )


def example() -> GLU:
    """A small instance, for the contract tests."""
    return GLU(d_ff=8)
