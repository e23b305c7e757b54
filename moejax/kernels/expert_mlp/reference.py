"""The definition of expert_mlp: every expert on every token, weighted by what the token chose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moejax.kernels.activations import glu_activation


def expert_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    experts: Array,
    weights: Array,
    *,
    biases: tuple[Array, Array, Array] | None = None,
    activation: str = "silu",
) -> Array:
    """out[t] = sum over k of weights[t, k] * MLP of experts[t, k] at x[t]; differentiable."""
    num_experts = w_gate.shape[0]
    chosen = experts[..., None] == jnp.arange(num_experts)  # [T, K, E]
    weight = jnp.sum(jnp.where(chosen, weights[..., None], 0), axis=1)  # [T, E]
    used = jnp.any(chosen, axis=(1, 2))[:, None]
    x = jnp.where(used, x, 0)

    def one_expert(w_gate, w_up, w_down, biases, weight):
        gate, up, down = (0, 0, 0) if biases is None else biases
        a = glu_activation(activation)(x @ w_gate + gate, x @ w_up + up)
        return weight[:, None] * (a @ w_down + down)

    y = jax.vmap(one_expert)(w_gate, w_up, w_down, biases, weight.T)
    return jnp.where(used, jnp.sum(y, axis=0), 0)  # selects the cotangent too
