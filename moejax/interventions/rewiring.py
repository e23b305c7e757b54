"""Adapts routing to each sequence while it is read and continued; no weight changes.

"Rewiring Experts on the Fly", arXiv 2510.14853. Each sequence and MoE layer has a vector that is
added to the router's logits. A few gradient steps on the context's own next-token cross-entropy
set it, before the first new token and after every so many; in between it stands still.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.interventions.add import Add
from moejax.interventions.stacked import stacked
from moejax.models.generate import Sampling, generate, padded, until
from moejax.models.output import Variables
from moejax.models.transformer import Transformer

Deltas = dict[str, Add]  # one per stack of layers, each `[count, B, 1, E]`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewiring:
    """How routing is adapted.

    Attributes:
      learning_rate: of plain gradient descent on each sequence's mean loss in nats per token. The
        paper gives 0.05 and names no optimiser.
      num_steps: gradient steps each time.
      every: new tokens between one adaptation and the next.
      share: the part of the MoE layers that is adapted in each sequence, those of the largest
        score; the paper does not give it.
      score: the paper's formula is -mean(log p of the chosen experts), which is largest where
        routing is least decisive, though the text calls it confidence. `formula` takes it as it
        stands, `decisive` its negative.
    """

    learning_rate: float = 0.05
    num_steps: int = 5
    every: int = 128
    share: float = 1.0
    score: Literal["formula", "decisive"] = "formula"

    def __post_init__(self) -> None:
        for name in ("num_steps", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} must be above 0 and at most 1")
        if self.score not in ("formula", "decisive"):
            raise UserError(f"score={self.score!r} must be 'formula' or 'decisive'")

    def start(self, model: Transformer, num_sequences: int) -> Deltas:
        """Zeros, with which the model is what it was."""
        if model.moe is None:
            raise UserError("rewiring needs a model with MoE layers, and this one has none")
        zero = Add(delta=jnp.zeros((num_sequences, 1, model.moe.num_experts)))
        return stacked(model, {}, elsewhere=zero)

    def adapt(
        self,
        model: Transformer,
        variables: Variables,
        tokens: Int[ArrayLike, "B S"],
        lengths: Int[ArrayLike, "B"],
        deltas: Deltas,
    ) -> tuple[Deltas, Float[Array, "steps B"]]:
        """`num_steps` gradient steps on every sequence's own loss.

        Args:
          tokens: contexts, each of `lengths` tokens from the left; what lies behind is ignored.
          deltas: from `start` or the adaptation before.

        Returns:
          The new deltas, and each sequence's loss before each step, in nats per token. A context
          of one token predicts nothing and changes nothing.
        """
        return _adapt(model, self, variables, jnp.asarray(tokens), jnp.asarray(lengths), deltas)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _adapt(model, rewiring, variables, tokens, lengths, deltas):
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]

    def losses(deltas: Deltas):
        out = model.apply(
            variables,
            tokens,
            segment_ids=mask.astype(jnp.int32),
            intervention=deltas,
            record=True,
        )
        log_probs = jax.nn.log_softmax(out.logits[:, :-1])
        nll = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        scored = mask[:, 1:]
        own = jnp.where(scored, nll, 0).sum(-1) / jnp.maximum(scored.sum(-1), 1)
        # A sequence's loss depends on its own delta only, so one gradient of the sum serves all.
        return own.sum(), (own, _layer_scores(model, out.stats, mask, rewiring.score))

    def step(deltas: Deltas, _):
        gradient, (own, scores) = jax.grad(losses, has_aux=True)(deltas)
        chosen = _chosen(model, scores, rewiring.share)
        descend = lambda name: jax.tree.map(
            lambda d, g: d - rewiring.learning_rate * jnp.where(chosen[name], g, 0),
            deltas[name],
            gradient[name],
        )
        return {name: descend(name) for name in deltas}, own

    return jax.lax.scan(step, deltas, length=rewiring.num_steps)


def _layer_scores(model: Transformer, stats: Any, mask: Array, score: str) -> Float[Array, "L B"]:
    """-mean over real tokens and chosen experts of log p, per MoE layer in order and sequence."""
    scores = []
    for name, row in model.moe_layers.values():
        trace = jax.tree.map(lambda a, row=row: a[row], stats[name]["trace"])
        probs = jnp.take_along_axis(trace["probs"], trace["experts"], axis=-1, mode="clip")
        tiny = jnp.finfo(probs.dtype).tiny
        surprise = -jnp.log(jnp.maximum(probs, tiny)).mean(-1).reshape(mask.shape)
        scores.append(jnp.where(mask, surprise, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1))
    found = jax.lax.stop_gradient(jnp.stack(scores))
    return found if score == "formula" else -found


def _chosen(model: Transformer, scores: Float[Array, "L B"], share: float) -> dict[str, Array]:
    """`{segment: [count, B, 1, 1]}`, True for the layers of largest score; ties all belong."""
    num_kept = max(round(share * len(scores)), 1)
    least = jnp.sort(scores, axis=0)[len(scores) - num_kept]
    kept = (scores >= least)[:, :, None, None]
    rows: dict[str, list[Array]] = {}
    for layer, (name, _) in enumerate(model.moe_layers.values()):
        rows.setdefault(name, []).append(kept[layer])
    return {name: jnp.stack(own) for name, own in rows.items()}


def generate_rewired(
    model: Transformer,
    variables: Variables,
    prompts: Sequence[Int[ArrayLike, " _"]],
    sampling: Sampling,
    rewiring: Rewiring,
    *,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[np.ndarray]:
    """As `models.generate.generate`, adapted to each prompt and to what was generated.

    Every prompt starts anew from zero. After an adaptation the context is read again with it, so
    that no key or value in the cache stems from other routing.
    """
    texts = [np.asarray(prompt, np.int32) for prompt in prompts]
    starts = [len(text) for text in texts]
    deltas = rewiring.start(model, len(texts))
    key = jax.random.key(seed)
    for first in range(0, sampling.max_new_tokens, rewiring.every):
        deltas, _ = rewiring.adapt(model, variables, *padded(texts), deltas)
        num_new = min(rewiring.every, sampling.max_new_tokens - first)
        new = generate(
            model,
            variables,
            texts,
            dataclasses.replace(sampling, max_new_tokens=num_new),
            seed=int(jax.random.bits(jax.random.fold_in(key, first), dtype=jnp.uint32) >> 1),
            intervention=deltas,
        )
        texts = [np.concatenate(pair) for pair in zip(texts, new, strict=True)]
    return [until(text[start:], stop_id) for text, start in zip(texts, starts, strict=True)]
