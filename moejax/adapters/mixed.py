"""A projection with a mixture of adapters beside it: a router weighs them, a bank applies them.

The common form of mixtures of LoRA that are plugged into single projections: MoLA (Gao et al.,
arXiv 2402.08562) is the one with `TopK` and `LoRABank`. Each method with another router or another
bank is a file of its own beside this.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.layers.adapter_leaf import ADAPTERS
from moejax.layers.linear import Linear, is_target, set_by_owner
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.granularity import Sequence, Static, Task
from moejax.layers.mixing.router import TopK
from moejax.layers.reports import tell
from moejax.types import Context


class MixedLinear(Linear):
    """`y = x W + b + bank(x, router(x))`.

    Attributes:
      router: weighs the adapters, one of `layers.mixing.router` or of this package.
      bank: `LoRABank` or another; it says how many adapters there are.
      targets: paths within the layer of the projections that get one; None for all. Set by
        whoever attaches the adapter.
    """

    router: nn.Module = dataclasses.field(default_factory=TopK)
    bank: nn.Module = dataclasses.field(default_factory=LoRABank)
    targets: tuple[str, ...] | None = set_by_owner(None)

    @property
    def loss_weights(self) -> dict[str, float]:
        """{term that the router reports: its weight in the loss}."""
        return self.router.loss_weights

    @nn.compact
    def __call__(self, x: Float[Array, "B S K"], context: Context) -> Float[Array, "B S N"]:
        y = super().__call__(x, context)
        if not is_target(self):
            return y
        widths = {"d_in": x.shape[-1], "d_out": self.features, "axes": self.axes}
        bank = self.bank.copy(**widths, name="adapters")
        router = self.router.copy(num_adapters=self.bank.num_adapters, name="routing")
        inner = bank.down(x, context)
        mixture = router(bank.seen_by_router(x, inner), context)
        tell(self, mixture.report(context))
        return y + bank.delta(x, inner, mixture, context)

    def matrix(self, dtype: Any) -> Float[Array, "K N"]:
        """W and what the bank adds. UserError where that differs from token to token."""
        base = super().matrix(dtype)
        if not is_target(self):
            return base
        if not isinstance(self.router.granularity, Static):
            raise UserError(
                f"the adapters of {self.name or 'this projection'} are weighed for every token "
                "anew, so no one matrix stands for them: they cannot be merged, and latent "
                "attention cannot decode with them on its key and value projection"
            )
        own = self.variables[ADAPTERS]
        nothing = jnp.zeros((1, 1, base.shape[0]), dtype)
        one = jnp.ones((1, 1), jnp.int32)
        context = Context(
            token_mask=one > 0, segment_ids=one, positions=one, token_ids=one, step=jnp.int32(0)
        )
        router = self.router.clone(num_adapters=self.bank.num_adapters)
        mixture = router.apply({ADAPTERS: own["routing"]}, nothing, context)
        bank = self.bank.clone(d_in=base.shape[0], d_out=base.shape[1])
        added = bank.apply({ADAPTERS: own["adapters"]}, mixture.weights[0, 0], method="merged")
        return base + added.astype(dtype)


def example() -> tuple[MixedLinear, ...]:
    """Small instances, for the contract tests."""
    bank = LoRABank(num_adapters=3, rank=2)
    seen = (Sequence(), Task(num_tasks=2), Static())
    return (
        MixedLinear(router=TopK(balance_weight=1e-2), bank=bank),
        *(MixedLinear(router=TopK(granularity=g), bank=bank) for g in seen),
    )
