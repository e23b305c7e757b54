"""Tunes routers so that samples which mean alike are routed alike, as successful ones are.

RoMA, "Routing Manifold Alignment", arXiv 2511.07419. Beside the cross-entropy of the answer, the
routing of the prompt's last token in the last few layers is drawn to that of its neighbours: the
samples with the nearest text embeddings among those that the untuned model answers rightly.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int

from moejax.errors import UserError
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken, forward
from moejax.objectives.neighbours import Neighbours
from moejax.objectives.objective import Result
from moejax.objectives.samples import before_responses, document_keys
from moejax.objectives.traced import layer_trace, without_traces
from moejax.types import Batch, Stats, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoMA:
    """nll(answer) + `weight` * sum_j W_ij |r_i - r_j|^2, the mean over samples i.

    r_i is the concatenation, over the chosen layers, of the router's probabilities over all
    experts at the last token of the prompt; r_j those of the untuned model, constants; W_ij sums
    to 1 over the neighbours j. `moejax neighbours` writes the file, which also names the layers.
    A sample that the file does not hold, or that a row boundary cuts, has no such term; the
    measure `aligned` is the share that has one.

    Attributes:
      neighbours: the file.
      weight: lambda, which the paper does not give. With 0 this is next-token prediction, and
        nothing is read.
    """

    neighbours: str
    weight: float = 1.0
    next_token: NextToken = dataclasses.field(default_factory=NextToken)

    @functools.cached_property
    def _table(self) -> Neighbours:
        return Neighbours.load(self.neighbours)

    def weights(self, model: Transformer) -> dict[str, float]:
        """{term: factor in the total loss}."""
        own = {"manifold": self.weight} if self.weight else {}
        return self.next_token.weights(model) | own

    def __call__(
        self,
        model: Transformer,
        variables: Any,
        batch: Batch,
        *,
        token_bytes: Int[ArrayLike, "V"],
        step: Array | int = 0,
        key: Array | None = None,
        loads: Any = None,
    ) -> Result:
        """Terms of one batch."""
        traced = bool(self.weight)
        out = forward(model, variables, batch, record=traced, step=step, key=key, loads=loads)
        result = self.next_token.result(out, batch, token_bytes)
        if not traced:
            return result
        terms, measures = self._manifold(model, out.stats, batch)
        return Result(
            terms=result.terms | terms,
            measures=result.measures | measures,
            stats=without_traces(result.stats),
        )

    def _manifold(self, model: Transformer, stats: Stats, batch: Batch) -> tuple[Terms, Terms]:
        table = self._table
        if missing := set(table.layers) - model.moe_layers.keys():
            raise UserError(
                f"{self.neighbours!r} is about layer {min(missing)}, which has no router here: "
                "make it with `moejax neighbours` for this model"
            )
        if table.num_experts != model.moe.num_experts:
            raise UserError(
                f"{self.neighbours!r} is about {table.num_experts} experts and the model has "
                f"{model.moe.num_experts}: make it with `moejax neighbours` for this model"
            )
        answers = before_responses(batch).reshape(-1)
        keys = document_keys(batch, salt=table.salt).reshape(2, -1)
        row, known = table.find(keys)
        known = known & answers
        probs = [layer_trace(model, stats, layer)["probs"] for layer in table.layers]
        routing = jnp.stack(probs, axis=1)  # [T, layers, E]
        # sum_j W_j |r - r_j|^2 = |r - m|^2 + spread, with m and spread the neighbours' weighted
        # mean and variance: so the table holds one routing per sample instead of all neighbours'.
        means = jnp.asarray(table.means, routing.dtype)[row]
        distance = jnp.square(routing - means).sum((1, 2)) + jnp.asarray(table.spreads)[row]
        total = jnp.where(known, distance, 0).sum()
        counted = lambda mask: mask.sum().astype(total.dtype)
        found = jax.lax.stop_gradient((counted(known), counted(answers)))
        return {"manifold": (total, counted(known))}, {"aligned": found}
