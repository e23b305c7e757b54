"""Routers of adapters: a gate on what they see, and what becomes of its probabilities.

`Softmax` uses them as they are; `TopK` keeps the largest k, as MixLoRA (arXiv 2404.15159) and MoLA
(arXiv 2402.08562) do. A method with a rule of its own derives from `Router` in its own file.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import UserError
from moejax.kernels import mixed_precision
from moejax.layers.adapter_leaf import adapter_leaf
from moejax.layers.linear import set_by_owner
from moejax.layers.mixing.granularity import Token
from moejax.layers.mixing.mixture import Mixture, row_balance
from moejax.types import Context, Term, at_least_f32

BALANCE = "adapter_balance"
# U(-1/sqrt(in), 1/sqrt(in)), what torch draws a Linear from.
uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Router(nn.Module):
    """`(x [B, S, F], context) -> Mixture` of `num_adapters`.

    Attributes:
      granularity: what the gate sees, one of `granularity`.
      gate_init: initialiser of the gate `[features, E]`, which has no bias.
      num_adapters: E. Set by the owner.
    """

    granularity: nn.Module = dataclasses.field(default_factory=Token)
    gate_init: nn.initializers.Initializer = uniform
    num_adapters: int = set_by_owner(0)

    @property
    def loss_weights(self) -> dict[str, float]:
        """{name of a term of its mixtures: its weight in the loss}."""
        return {}

    def gate(self) -> Gate:
        """Within the router's call: what gives its logits."""
        return Gate(self.num_adapters, self.granularity.copy(), self.gate_init, name="gate")


class Gate(nn.Module):
    """Logits `[B, s, E]` of what `granularity` makes of x; in at least float32."""

    num_adapters: int
    granularity: nn.Module
    init_kernel: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Float[Array, "B s E"]:
        seen = self.granularity.copy(name="sees")(x, context)
        seen = seen.astype(at_least_f32(seen.dtype))
        shape = (seen.shape[-1], self.num_adapters)
        kernel = adapter_leaf(self, "kernel", self.init_kernel, shape, (None, None))
        return mixed_precision.matmul(seen, kernel)


class Softmax(Router):
    """The gate's probabilities, all of them."""

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Mixture:
        return Mixture(weights=jax.nn.softmax(self.gate()(x, context), axis=-1))


class TopK(Router):
    """The k largest probabilities, divided by their sum.

    Attributes:
      k: adapters per token.
      balance_weight: of the load-balance loss E sum_e f_e P_e in the loss, f_e being the share of
        the row's tokens that chose e and P_e its mean probability; k where all are used alike.
    """

    k: int = 2
    balance_weight: float = 0.0

    @property
    def loss_weights(self) -> dict[str, float]:
        """The load balance's."""
        return {BALANCE: self.balance_weight} if self.balance_weight else {}

    @property
    def constant_weights(self) -> str:
        """Why the weights do not depend on the logits, so that no gradient comes; empty if not."""
        return "" if self.k > 1 else "k=1 divides every weight by itself: set k=2 or more"

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Mixture:
        check_k(self.k, self.num_adapters)
        # The logits are all that is kept for the gradients; the rest is computed again from them.
        weigh = jax.checkpoint(functools.partial(_largest, self.k), prevent_cse=False)
        weights, chosen, balance = weigh(self.gate()(x, context), context.token_mask)
        terms = {BALANCE: balance} if self.balance_weight else {}
        return Mixture(weights=weights, chosen=chosen, terms=terms)


def _largest(k: int, logits: Array, mask: Array) -> tuple[Array, Array, Term]:
    """(weights, chosen adapters, load balance)."""
    probs = jax.nn.softmax(logits, axis=-1)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probs), k)
    picked = is_chosen(chosen, logits.shape[-1])
    kept = jnp.where(picked, probs, 0)
    balance = row_balance(picked.astype(probs.dtype), probs, mask)
    return kept / kept.sum(axis=-1, keepdims=True), chosen, balance


def is_chosen(chosen: Int[Array, "B s k"], num_adapters: int) -> Bool[Array, "B s E"]:
    """Which adapters are among the chosen."""
    return (chosen[..., None] == jnp.arange(num_adapters)).any(axis=-2)


def check_k(k: int, num_adapters: int) -> None:
    """Raises UserError unless k of so many adapters can be chosen."""
    if not 1 <= k <= num_adapters:
        raise UserError(
            f"router.k={k} must be between 1 and the number of adapters, {num_adapters}"
        )
