"""LoRA on routed experts: thin factors beside each expert's three matrices, or shared by all.

Hu et al., arXiv 2106.09685, applied to stacked experts, as PEFT does for 3-D parameters;
rank-stabilised scaling (rsLoRA), Kalajdzievski, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float, Int

from moejax.errors import UserError
from moejax.experts.glu import GLU
from moejax.kernels.activations import glu_activation
from moejax.kernels.expert_mlp.slots import rows_of_tokens, sort_slots, tokens_of_rows
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.layers.adapter_leaf import adapter_leaf
from moejax.layers.linear import is_target, set_by_owner
from moejax.parallel.sharding import Names, once
from moejax.types import at_least_f32

_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
PROJECTIONS = ("gate", "up", "down")


class LoRAGLU(GLU):
    """`GLU` whose matrices are `W[e] + s A[e] B[e]`, s = alpha / rank.

    Fresh, every A is uniform in +-1/sqrt(in) and every B zero. Products run one after another on
    rows sorted by expert (`grouped_matmul`); where no projection of the layer is a target, as `GLU`
    runs them.

    Attributes:
      d_ff, activation, use_bias, implementation, down_init: of the `GLU` that this replaces, where
        a model's adapter replaces it.
      rank: width r of the factors.
      alpha: see s.
      share_a, share_b: one A, one B for all experts of a layer.
      targets: paths within the layer of the projections that get factors; None for all. Set by
        whoever attaches the adapter.
    """

    d_ff: int = 0
    rank: int = 8
    alpha: float = 8.0
    share_a: bool = False
    share_b: bool = False
    targets: tuple[str, ...] | None = set_by_owner(None)

    @nn.compact
    def __call__(
        self, num_experts: int, d_model: int
    ) -> tuple[Any, dict[str, Names], Callable[..., Array]]:
        if self.rank < 1:
            raise UserError(f"adapter.experts.rank={self.rank} must be at least 1")
        weights, axes, compute = super().__call__(num_experts, d_model)
        chosen = [name for name in PROJECTIONS if is_target(self, name)]
        for name in chosen:
            expert, into, out_of = axes[name]
            _, d_in, d_out = weights[name].shape
            factors = {
                "a": (_uniform, (d_in, self.rank), (into, None), self.share_a),
                "b": (initializers.zeros, (self.rank, d_out), (None, out_of), self.share_b),
            }
            for factor, (init, shape, names, shared) in factors.items():
                count = 1 if shared else num_experts
                own = (None if shared else expert, *names)
                leaf = adapter_leaf(self, f"{name}_{factor}", init, (count, *shape), own)
                weights[f"{name}_{factor}"] = jnp.broadcast_to(leaf, (num_experts, *shape))
                axes[f"{name}_{factor}"] = (expert, *names)
        return weights, axes, self.compute_adapted if chosen else compute

    def merged(
        self,
        kernel: Float[Array, "*e K N"],
        a: Float[Array, "*a K r"],
        b: Float[Array, "*b r N"],
    ) -> Float[Array, "*e K N"]:
        """W + s A B of every expert, or of some; a factor that is shared has one entry."""
        return kernel + self.scale * (a @ b)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def compute_adapted(
        self,
        rows: Float[Array, "R D"],
        local_ids: Int[Array, "R K"],
        gate: Float[Array, "R K"],
        weights: dict[str, Array],
    ) -> Float[Array, "R D"]:
        """The weighted sum of the chosen experts' outputs for each row."""
        dtype, wide = rows.dtype, at_least_f32(rows.dtype)
        w = {name: value.astype(dtype) for name, value in weights.items()}
        if self.use_bias:
            w["down_bias"] = once(w["down_bias"], "expert_mlp")
        slots = sort_slots(local_ids, w["gate"].shape[0])
        expert = jnp.minimum(slots.to_rows(local_ids), w["gate"].shape[0] - 1)

        def product(x: Array, matrices: Array) -> Array:
            how = {"implementation": self.implementation, "preferred_element_type": dtype}
            return grouped_matmul(x, matrices, slots.group_sizes, **how)

        def project(name: str, x: Array) -> Array:
            y = product(x, w[name])
            if self.use_bias:  # wide, so that its gradient is summed so, over an expert's rows
                y = (y.astype(wide) + w[f"{name}_bias"].astype(wide)[expert]).astype(dtype)
            if f"{name}_a" in w:
                y = y + self.scale * product(product(x, w[f"{name}_a"]), w[f"{name}_b"])
            return y

        x = rows_of_tokens(rows, slots)
        pre = project("gate", x).astype(wide), project("up", x).astype(wide)
        hidden = glu_activation(self.activation)(*pre).astype(dtype)
        score = slots.to_rows(gate.astype(wide))
        y = project("down", hidden).astype(wide) * score[:, None]
        return tokens_of_rows(y, slots, dtype)


class RsLoRAGLU(LoRAGLU):
    """`LoRAGLU` with s = alpha / sqrt(rank), beside `RsLoRA` on the other projections."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / math.sqrt(self.rank)


def example() -> tuple[LoRAGLU, ...]:
    """Small instances, for the contract tests."""
    return (
        LoRAGLU(d_ff=8, rank=2),
        LoRAGLU(d_ff=8, rank=2, use_bias=True, activation="swiglu_clamped", share_a=True),
        LoRAGLU(d_ff=8, rank=2, share_b=True),
        RsLoRAGLU(d_ff=8, rank=2),
    )
