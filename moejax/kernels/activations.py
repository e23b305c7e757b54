"""Gated activations `(gate, up) -> h`, shared by `expert_mlp`, dense MLPs and shared experts.

Shazeer, arXiv 2002.05202; the clamped form is gpt-oss's (arXiv 2508.10925).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.errors import UserError

GluActivation = Callable[[Array, Array], Array]

_CLAMP = 7.0  # gpt-oss: gate is cut above, up on both sides
_SLOPE = 1.702  # gpt-oss: the sigmoid approximation of GELU


def silu(gate: Array, up: Array) -> Array:
    """SwiGLU: gate * sigmoid(gate) * up."""
    return jax.nn.silu(gate) * up


def gelu(gate: Array, up: Array) -> Array:
    """GEGLU with the exact, erf-based GELU (what transformers calls `gelu`)."""
    return jax.nn.gelu(gate, approximate=False) * up


def gelu_tanh(gate: Array, up: Array) -> Array:
    """GEGLU with the tanh approximation of GELU (what transformers calls `gelu_pytorch_tanh`)."""
    return jax.nn.gelu(gate, approximate=True) * up


def swiglu_clamped(gate: Array, up: Array) -> Array:
    """gpt-oss: g = min(gate, 7), u = clip(up, -7, 7); g * sigmoid(1.702 g) * (u + 1)."""
    gate = jnp.minimum(gate, _CLAMP)
    up = jnp.clip(up, -_CLAMP, _CLAMP)
    return gate * jax.nn.sigmoid(_SLOPE * gate) * (up + 1)


GLU_ACTIVATIONS: dict[str, GluActivation] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu_clamped": swiglu_clamped,
}


def glu_activation(name: str) -> GluActivation:
    """The gated activation of that name; UserError lists the known names."""
    if name not in GLU_ACTIVATIONS:
        raise UserError(
            f"unknown gated activation {name!r}; use one of {', '.join(sorted(GLU_ACTIVATIONS))}"
        )
    return GLU_ACTIVATIONS[name]
