"""The MoE feed-forward: router -> transport(experts) -> combine, plus balance and statistics."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.balance.rule import CORRECTION_BIAS, Rule
from moejax.errors import UserError
from moejax.parallel.sharding import constrain
from moejax.types import Context, Routing, Stats, Terms, add_terms


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer.

    Statistics, summed over the tokens of one pass: `load` `[E]` (choices per expert), `tokens`,
    `entropy` (of the router, nats), the transport's counts, and whatever the router put in
    `Routing.extras` but `log_prob`, which is per token. With `context.record` also `trace`, the
    routing itself: `experts` and `weights` `[T, K]`, `probs` and `logits` `[T, E]`. It adds up to
    nothing, and gradients flow through it.

    Attributes:
      num_experts: routed experts E.
      router: `(x [T, D], context) -> (Routing, carry)`.
      experts: `(num_experts, d_model) -> (weights, their logical axes, compute)`.
      transport: how tokens and weights meet; never drops silently.
      balance: the balance rules. There is no default: a model states its balancing, and
        `Unbalanced()` states none.
      shared: an MLP that every token passes through besides (shared experts), or None.
    """

    num_experts: int
    router: nn.Module
    experts: nn.Module
    transport: Any
    balance: tuple[Rule, ...]
    shared: nn.Module | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], context: Context
    ) -> tuple[Float[Array, "B S D"], Terms, Stats, Any]:
        """Returns (y, terms, stats, router carry). Padding is routed nowhere and counts nowhere.

        `x` must be finite at padding; `Block` sees to it.
        """
        self._check_balance()
        states = [self._remembered(i, rule) for i, rule in enumerate(self.balance)]
        biases = [b for b in map(_selection_bias, self.balance, states) if b is not None]
        context = context.replace(
            num_experts=self.num_experts,
            selection_bias=sum(biases) if biases else None,
        )
        rows = constrain(x.reshape(-1, x.shape[-1]), "tokens", None)  # [T, D]
        routing, carry = self.router(rows, context)
        routing = without_padding(routing, context.token_mask.reshape(-1))
        weights, axes, compute = self.experts(self.num_experts, x.shape[-1])
        y, counts = self.transport(rows, routing, weights, compute, axes=axes)
        y = constrain(y.reshape(x.shape).astype(x.dtype), "batch", "sequence", None)
        if self.shared is not None:
            y = y + self.shared(x, context)

        terms: Terms = {}
        # Initialisation sees one token, and decoding some rows: neither fits rules about batches.
        batch = not (self.is_initializing() or context.decode)
        rules = zip(self.balance, states, strict=True) if batch else ()
        for rule, state in rules:
            terms = add_terms(terms, rule.terms(routing, context, state))
        return y, terms, _statistics(routing, context, counts), carry

    def _check_balance(self) -> None:
        if not self.balance:
            raise UserError(
                "ffn.balance is empty: name at least one rule, for example TwoPassLoadBalance("
                "weight=0.01); Unbalanced() states that there is none"
            )
        names = [rule.name for rule in self.balance if rule.name]
        if len(set(names)) < len(names):
            raise UserError(f"ffn.balance has a rule twice among {', '.join(names)}: keep one")

    def _remembered(self, index: int, rule: Rule) -> dict[str, Array]:
        """The rule's remembered arrays, kept in the collection `router_state`."""
        initial = functools.partial(rule.state, self.num_experts)
        return {
            key: self.variable(
                "router_state", f"balance_{index}_{key}", lambda key=key: initial()[key]
            ).value
            for key in jax.eval_shape(initial)
        }

    def update_router_state(
        self, state: dict[str, Array], stats: Stats, *, frozen: bool = False
    ) -> dict[str, Array]:
        """The next `router_state` of one layer, from statistics of the whole optimiser step.

        Of a frozen router what takes part in selection stays: its choices are frozen too.
        """
        new = dict(state)
        for index, rule in enumerate(self.balance):
            prefix = f"balance_{index}_"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            for key, value in rule.update(own, stats).items():
                if not (frozen and key == CORRECTION_BIAS):
                    new[prefix + key] = value
        return new


def without_place(path: str) -> str:
    """`path` of router state, whichever of a model's rules in order keeps it."""
    return re.sub(r"(?<=/)balance_\d+_", "", path)


def _selection_bias(rule: Rule, state: dict[str, Array]) -> Float[Array, "E"] | None:
    bias = rule.selection_bias(state)
    if bias is not None and state and CORRECTION_BIAS not in state:
        raise UserError(
            f"{type(rule).__name__} keeps what it adds to selection as {', '.join(state)}: name it "
            f"{CORRECTION_BIAS}, by which it is frozen with the router and exported"
        )
    return bias


def without_padding(routing: Routing, mask: Array) -> Routing:
    """Empty slots for padding, by selection: whatever the router computed there is dropped."""
    num_experts = routing.probs.shape[-1]
    keep = mask[:, None]
    return Routing(
        experts=jnp.where(keep, routing.experts, num_experts),
        weights=jnp.where(keep, routing.weights, 0),
        probs=jnp.where(keep, routing.probs, 0),
        logits=jnp.where(keep, routing.logits, 0),
        extras=routing.extras,
    )


def _statistics(routing: Routing, context: Context, counts: Stats) -> Stats:
    num_experts = routing.probs.shape[-1]
    probs = jax.lax.stop_gradient(routing.probs)
    entropy = -jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1)), 0).sum()
    picked = routing.experts[:, :, None] == jnp.arange(num_experts)
    own = counts | {
        "load": picked.sum(axis=(0, 1)).astype(jnp.int32),
        "tokens": context.token_mask.sum().astype(jnp.int32),
        "entropy": entropy,
    }
    extras = {k: jax.lax.stop_gradient(v) for k, v in routing.extras.items() if k != "log_prob"}
    if clash := own.keys() & extras.keys():
        raise ValueError(f"the router's extras use names of the layer: {', '.join(sorted(clash))}")
    if context.record:
        names = ("experts", "weights", "probs", "logits")
        own["trace"] = {name: getattr(routing, name) for name in names}
    return own | extras
