"""Unlearning through one expert: forget one source, keep another, hold the router in place.

SEUF, "Is Unlearning One Expert Enough", arXiv 2411.18797, equations 2 to 4. The expert is the one
to which the routers send the forget set most (`analysis`, attribution); it and its layer's router
train, and everything else is frozen:

    trainable=["layers_7/ffn/experts/*@expert=12", "layers_7/ffn/router/*"] model.boundaries=[7,8]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.models.output import Output
from moejax.models.stack import stacked_layers
from moejax.models.transformer import Transformer
from moejax.objectives.lm import forward, target_bytes, token_nll
from moejax.objectives.objective import Result
from moejax.objectives.traced import layer_trace, without_traces
from moejax.types import Batch, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnExpert:
    """-nll(forget) + `retain_weight` * nll(retain) + `anchor_weight` * |probs - one-hot|^2.

    The forget loss is gradient ascent on the first source of the data's `Mixture`; the others are
    retained, which makes it the paper's GDiff (GA with `retain_weight=0`). Gradient ascent has no
    lower bound: the guard and `steps` are what ends it. The anchor is the mean over real tokens of
    the forget set of the squared distance between the layer's router probabilities and the
    expert's indicator, so that the router does not flee from the expert that unlearns.

    Attributes:
      layer: global index of the MoE layer.
      expert: which of its routed experts unlearns.
      retain_weight: the paper's lambda, whose value it does not give.
      anchor_weight: the paper's alpha; 1 is its best.
    """

    layer: int
    expert: int
    retain_weight: float = 1.0
    anchor_weight: float = 1.0

    def weights(self, model: Transformer) -> dict[str, float]:
        """{term: factor in the total loss}."""
        own = {"lm": self.retain_weight, "forget": -1.0, "anchor": self.anchor_weight}
        return own | model.loss_weights()

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
        """Terms of one batch: `lm` (of what is retained) and `forget` are nats per token."""
        self._check(model, batch)
        out = forward(model, variables, batch, record=True, step=step, key=key, loads=loads)
        nll = token_nll(out, batch)
        forgets = batch.sources == 0
        own = {
            "lm": _sum(nll, batch.loss_mask & ~forgets),
            "forget": _sum(nll, batch.loss_mask & forgets),
            "anchor": _sum(self._distance(model, out, batch), (batch.segment_ids > 0) & forgets),
        }
        num_bytes = _sum(target_bytes(batch, token_bytes), batch.loss_mask)[0]
        nats = jax.lax.stop_gradient(own["lm"][0] + own["forget"][0])
        measures = {"bits_per_byte": (nats / math.log(2), num_bytes.astype(nats.dtype))}
        measures |= out.measures
        return Result(terms=own | out.terms, measures=measures, stats=without_traces(out.stats))

    def check_trained(
        self, model: Transformer, trained: Mapping[str, tuple[int, ...] | None]
    ) -> None:
        """Raises UserError unless the expert trains: without it nothing would be unlearned."""
        stack = next(
            name for name, own in stacked_layers(model.segments).items() if self.layer in own
        )
        of_layer = [own for path, own in trained.items() if f"{stack}/ffn/experts/" in path]
        if any(chosen is None or self.expert in chosen for chosen in of_layer):
            return
        ends = [end for end in (self.layer, self.layer + 1) if 0 < end < model.num_layers]
        of = f"layers_{self.layer}/ffn"
        raise UserError(
            f"expert {self.expert} of layer {self.layer} does not train, and objective "
            f"UnlearnExpert unlearns through it: give model.boundaries={ends} and "
            f'trainable=["{of}/experts/*@expert={self.expert}", "{of}/router/*"]'
        )

    def _distance(self, model: Transformer, out: Output, batch: Batch) -> Float[Array, "B S"]:
        probs = layer_trace(model, out.stats, self.layer)["probs"]
        target = jax.nn.one_hot(self.expert, probs.shape[-1], dtype=probs.dtype)
        return jnp.square(probs - target).sum(-1).reshape(batch.tokens.shape)

    def _check(self, model: Transformer, batch: Batch) -> None:
        if batch.sources is None:
            raise UserError(
                "objective UnlearnExpert needs data.train to be a Mixture: its first source is "
                "forgotten and the others are retained"
            )
        if self.layer not in model.moe_layers:
            raise UserError(
                f"objective.layer={self.layer} has no router: the MoE layers are "
                f"{', '.join(map(str, model.moe_layers))}"
            )
        if not 0 <= self.expert < model.moe.num_experts:
            raise UserError(
                f"objective.expert={self.expert} must be between 0 and "
                f"num_experts - 1 = {model.moe.num_experts - 1}"
            )


def _sum(values: Array, mask: Array) -> Term:
    total = jnp.where(mask, values, 0).sum()
    return total, mask.sum().astype(total.dtype)
