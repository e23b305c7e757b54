"""MixLoRA: one router for a whole MLP, whose experts are adapted copies of its three projections.

Li et al., arXiv 2404.15159. Expert e is down_e(activation(gate_e(x), up_e(x))) with W_e = W + s A_e
B_e. The frozen products are shared: gate and up once for all experts, and down, being linear, once
for their weighted sum.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.experts.dense import DenseGLU
from moejax.kernels.activations import glu_activation
from moejax.layers.linear import is_target, set_by_owner
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.router import TopK
from moejax.layers.reports import tell
from moejax.types import Context


class MixLoRA(DenseGLU):
    """`DenseGLU` that is a mixture of adapted copies of itself.

    With fresh adapters every expert is the MLP itself, and so is their mixture, bit for bit: of the
    weights, which sum to one, the first is what the others leave. The paper: 8 experts, two per
    token, gate drawn normal(0, 0.02); attention gets plain LoRA.

    Attributes:
      d_ff, activation, use_bias, gated, linear: of the `DenseGLU` that this replaces, where a
        model's adapter replaces it.
      router: `TopK`, its k adapters per token and the balance loss.
      bank: factors of each projection.
      targets: paths within the layer of the projections that get factors; None for all. Set by
        whoever attaches the adapter.
    """

    d_ff: int = 0
    router: TopK = dataclasses.field(
        default_factory=lambda: TopK(gate_init=nn.initializers.normal(0.02))
    )
    bank: LoRABank = dataclasses.field(default_factory=LoRABank)
    targets: tuple[str, ...] | None = set_by_owner(None)

    @property
    def loss_weights(self) -> dict[str, float]:
        """{term that the router reports: its weight in the loss}."""
        return self.router.loss_weights

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        num_adapters, d_model = self.bank.num_adapters, x.shape[-1]
        mixture = self.router.copy(num_adapters=num_adapters, name="routing")(x, context)
        tell(self, mixture.report(context))
        weights, chosen = jax.lax.top_k(mixture.weights.astype(x.dtype), self.router.k)
        each = [_one_hot(chosen[..., j], num_adapters, x) for j in range(self.router.k)]

        def project(name: str, value: Array) -> list[Array]:
            """The projection of `value` by each chosen expert."""
            linear = self.linear.copy(
                features=self.d_ff, use_bias=self.use_bias, axes=("embed", "mlp"), name=name
            )
            base, bank = linear(value, context), self._bank(name, d_model, self.d_ff)
            if bank is None:
                return [base] * len(each)
            inner = bank.down(value, context)
            return [base + bank.up(inner, one) for one in each]

        activation = glu_activation(self.activation)
        pairs = zip(project("gate", x), project("up", x), strict=True)
        hidden = [activation(gate, up) for gate, up in pairs]
        # The first expert's weight is what the others leave, and so would hide that it is NaN.
        unknown = jnp.isnan(weights).any(axis=-1, keepdims=True)
        mixed = jnp.where(unknown, jnp.nan, hidden[0])
        for j, own in enumerate(hidden[1:], start=1):
            mixed = mixed + weights[..., j, None] * (own - hidden[0])
        down = self.linear.copy(
            features=d_model, use_bias=self.use_bias, axes=("mlp", "embed"), name="down"
        )
        y = down(mixed, context)
        if bank := self._bank("down", self.d_ff, d_model):
            inner = sum(
                bank.down(own, context) * (weights[..., j, None] * each[j])[..., None]
                for j, own in enumerate(hidden)
            )
            y = y + bank.up(inner, jnp.ones((x.shape[0], 1, num_adapters), x.dtype))
        if self.gated:
            scale = self.linear.copy(features=1, axes=("embed", None), name="shared_gate")
            y = y * jax.nn.sigmoid(scale(x, context))
        return y

    def _bank(self, name: str, d_in: int, d_out: int) -> LoRABank | None:
        if not is_target(self, name):
            return None
        axes = ("mlp", "embed") if name == "down" else ("embed", "mlp")
        return self.bank.copy(d_in=d_in, d_out=d_out, axes=axes, name=f"{name}_adapters")


def _one_hot(chosen: Int[Array, "B s"], num: int, x: Float[Array, "B S D"]) -> Array:
    """`[B, S, E]`."""
    one = jax.nn.one_hot(chosen, num, dtype=x.dtype)
    return jnp.broadcast_to(one, (*x.shape[:2], num))


def example() -> MixLoRA:
    """A small instance, for the contract tests."""
    return MixLoRA(d_ff=8, gated=True, bank=LoRABank(num_adapters=3, rank=2))
