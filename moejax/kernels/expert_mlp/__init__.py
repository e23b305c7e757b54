"""Mixture of gated experts for one device: permute, gate and up, down, combine, in one gradient.

Saves x, the pre-activations, the routing weights and indices, and nothing else: neither gathered
copies of x nor the experts' outputs (the algebra of SonicMoE, arXiv 2512.14080; see `algebra.py`).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels import compat
from moejax.kernels.activations import glu_activation
from moejax.kernels.expert_mlp import reference, tile_scan
from moejax.kernels.expert_mlp.algebra import Activations, Weights
from moejax.kernels.expert_mlp.grouped import GroupedExperts
from moejax.kernels.expert_mlp.slots import Slots, sort_slots
from moejax.kernels.grouped_matmul.implementations import Choice, choose
from moejax.types import at_least_f32


class Biases(NamedTuple):
    """Biases of E experts."""

    gate: Float[Array, "E F"]
    up: Float[Array, "E F"]
    down: Float[Array, "E D"]


def expert_mlp(
    x: Float[Array, "T D"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    biases: tuple[Float[Array, "E F"], Float[Array, "E F"], Float[Array, "E D"]] | None = None,
    activation: str = "silu",
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """out[t] = sum over k of weights[t, k] * MLP[experts[t, k]](x[t]), and no token is dropped.

    MLP[e](v) = act(v w_gate[e] + b_gate[e], v w_up[e] + b_up[e]) w_down[e] + b_down[e].

    An id outside `[0, E)` is an empty slot: nothing is computed for it, its weight may be NaN and
    gets a zero gradient. A row of `x`, or of the cotangent, that no slot uses may be NaN without
    effect. A token may name the same expert twice.

    Products accumulate in at least float32; activations are computed in at least float32 and saved
    in the dtype of `x`. Differentiable once, in reverse mode, in x, all weights, the biases and
    `weights`. Works under jit, scan, remat, shard_map and (sequentially) vmap.

    Args:
      x: tokens. Its dtype is the result's; products run in the dtype promoted from x and w_*.
      w_gate, w_up, w_down: the experts' matrices.
      experts: the chosen experts' ids.
      weights: what each choice counts for.
      biases: on the three projections, in the order of `Biases`; all or none.
      activation: a key of `activations.GLU_ACTIVATIONS`.
      implementation: one of `IMPLEMENTATIONS` of grouped_matmul, for all its products, or None to
        let `dispatch.choose` pick each. "reference" is the definition, for comparisons: every
        expert on every token, differentiated by JAX.

    Raises:
      UserError: an unknown activation or implementation.
      ValueError: shapes that do not fit.
    """
    biases = None if biases is None else Biases(*biases)
    _check(x, w_gate, w_up, w_down, experts, weights, biases)
    glu_activation(activation)
    w = Weights(w_gate, w_up, w_down, *(biases or (None,) * 3))
    compute = jnp.result_type(x, *(v for v in w if v is not None))
    if implementation == "reference":
        return _defined(activation, at_least_f32(compute), x, w, experts, weights).astype(x.dtype)
    choice = choose("expert_mlp", implementation, compute)
    if experts.size == 0 or 0 in w_gate.shape:
        return jnp.zeros_like(x)
    w = jax.tree.map(lambda v: v.astype(compute), w)
    operands = compat.vary_alike((x.astype(compute), w, experts, weights))
    return _expert_mlp(activation, choice, *operands).astype(x.dtype)


def _defined(activation, dtype, x, w, experts, weights):
    x, w, weights = jax.tree.map(lambda v: v.astype(dtype), (x, w, weights))
    biases = None if w.down_bias is None else w[3:]
    return reference.expert_mlp(x, *w[:3], experts, weights, biases=biases, activation=activation)


def _kernels(choice: Choice) -> ModuleType | GroupedExperts:
    """`forward` and `backward` over sorted rows."""
    return tile_scan if set(choice) == {"tile_scan"} else GroupedExperts(choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_mlp(activation, choice, x, w, experts, weights):
    return _forward(activation, choice, x, w, experts, weights)[0]


def _forward(activation, choice, x, w, experts, weights):
    slots = sort_slots(experts, w.gate.shape[0])
    y, h = _kernels(choice).forward(x, w, slots, glu_activation(activation))
    return slots.sum_by_token(y, x.dtype, weights=weights), (x, h, w, slots, weights)


def _backward(
    activation: str,
    choice: Choice,
    saved: tuple[Array, Activations, Weights, Slots, Array],
    dout: Array,
):
    x, h, w, slots, weights = saved
    act = glu_activation(activation)
    score = slots.to_rows(weights)
    dx, dscore, dw = _kernels(choice).backward(dout, x, score, h, w, slots, act)
    dw = jax.tree.map(lambda d, v: d.astype(v.dtype), dw, w)
    dweights = slots.from_rows(dscore).astype(weights.dtype)
    return slots.sum_by_token(dx, x.dtype), dw, None, dweights


_expert_mlp.defvjp(_forward, _backward)


def _check(x, w_gate, w_up, w_down, experts, weights, biases) -> None:
    if x.ndim != 2 or w_gate.ndim != 3:
        raise ValueError(
            f"expert_mlp needs x [T, D] and w_gate [E, D, F]; got {x.shape}, {w_gate.shape}"
        )
    num_tokens, d_model = x.shape
    num_experts, _, d_expert = w_gate.shape
    into, out_of = (num_experts, d_model, d_expert), (num_experts, d_expert, d_model)
    expected = {"w_gate": (w_gate, into), "w_up": (w_up, into), "w_down": (w_down, out_of)}
    if experts.ndim != 2 or not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(
            f"expert_mlp needs integer experts [T, K]; got {experts.dtype}{list(experts.shape)}"
        )
    slots = (num_tokens, experts.shape[1])
    expected |= {"experts": (experts, slots), "weights": (weights, slots)}
    if biases is not None:
        expected |= {
            "biases.gate": (biases.gate, (num_experts, d_expert)),
            "biases.up": (biases.up, (num_experts, d_expert)),
            "biases.down": (biases.down, (num_experts, d_model)),
        }
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(
                f"expert_mlp needs {name} of shape {shape} for x {x.shape}, w_gate {w_gate.shape} "
                f"and experts {experts.shape}; got {value.shape}"
            )
