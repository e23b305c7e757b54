"""SparseMixer: two experts chosen by two masked softmaxes, sampled in training (Phi-3.5-MoE).

Liu et al., "GRIN", arXiv 2409.12136, with the estimator of arXiv 2310.00811. Mask, draws, steps and
gradient are those of the model's code in transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float, Int

from moejax.errors import UserError
from moejax.layers.row_keys import fold_in
from moejax.routers.selection import intervened, is_held, own_scores, select
from moejax.types import Context, Routing, at_least_f32

_STREAM = 0x5B  # of this router's draws
_FULL_STEP = 0.25  # how often a choice that is not the best is weighed in full
_PART_STEP = 1 / 3  # and by how much otherwise; transformers rounds it to 0.3333


class SparseMixer(nn.Module):
    """Chooses one expert among those that are nearly best, then another among the rest.

    Each time, with s the logits and b the best of those not chosen yet, the experts with
    `b - s <= 2 jitter max(|s|, b)` form a softmax. Without a key the best of them is chosen; with
    one (training), one is drawn from that softmax. The choice's weight is its probability p in the
    softmax, so the two weights have no fixed sum.

    In training a choice that is not the best counts as p in one case of four and as p / 3 in the
    others, at random (Heun's third-order method). The gradient is in all cases that of p.
    `Routing.extras["log_prob"]` `[T]` is then the logarithm of the probability of both choices, in
    which padding and a replayed empty slot count 0. Neither meshes nor microbatches nor padding
    behind the sequences change a draw.

    Noise on the layer's input (`input_jitter_noise`), which experts would see too, is not added.

    Attributes:
      jitter: how near, relative to its logit, an expert must be to the best.
    """

    jitter: float = 0.01
    kernel_init: nn.initializers.Initializer = initializers.normal(0.02)
    k: ClassVar[int] = 2

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], context: Context) -> tuple[Routing, None]:
        num_experts = context.num_experts
        self._check(context)
        dtype = at_least_f32(x.dtype)
        init = nn.with_logical_partitioning(self.kernel_init, ("embed", None))
        kernel = self.param("kernel", init, (x.shape[-1], num_experts), jnp.float32)
        logits = intervened(x.astype(dtype) @ kernel.astype(dtype), context)

        left, chosen, weights, probabilities = logits, [], [], []
        for turn in range(self.k):
            near = self._near(logits, left)  # [T, E]
            choice = self._choose(near, turn, context)  # [T, 1]
            probability = own_scores(jax.nn.softmax(near), choice)
            step = jax.lax.stop_gradient(self._step(near, choice, turn, context))
            chosen.append(choice)
            probabilities.append(probability)
            weights.append(probability + jax.lax.stop_gradient(probability * (step - 1)))
            left = jnp.where(choice == jnp.arange(num_experts), -jnp.inf, left)
        experts, extras = jnp.concatenate(chosen, axis=-1), {}
        if context.key is not None:
            counts = context.token_mask.reshape(-1, 1) & is_held(experts, num_experts)
            both = jnp.where(counts, jnp.concatenate(probabilities, axis=-1), 1)
            extras["log_prob"] = jnp.log(both).sum(-1)
        routing = Routing(
            experts=experts,
            weights=jnp.concatenate(weights, axis=-1),
            probs=jax.nn.softmax(logits),
            logits=logits,
            extras=extras,
        )
        return routing, None

    def _near(self, logits: Float[Array, "T E"], left: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """The logits of those `left` that are nearly the best of them, the others at -inf."""
        best = left.max(axis=-1, keepdims=True)
        is_near = best - logits <= 2 * self.jitter * jnp.maximum(jnp.abs(logits), best)
        return jnp.where(is_near, left, -jnp.inf)

    def _choose(self, near: Float[Array, "T E"], turn: int, context: Context) -> Int[Array, "T 1"]:
        """The best, or one drawn; or the one that another run chose in this turn."""
        scores = jax.lax.stop_gradient(near)
        if context.key is not None:
            scores = scores + _drawn(jax.random.gumbel, near.shape, near.dtype, context, turn)
        if context.selection is not None:
            context = context.replace(selection=context.selection[:, turn : turn + 1])
        return select(scores, 1, context)

    def _step(
        self, near: Float[Array, "T E"], choice: Int[Array, "T 1"], turn: int, context: Context
    ) -> Float[Array, "T 1"] | float:
        """What the weight is multiplied by, outside its gradient."""
        if context.key is None:
            return 1.0
        draw = _drawn(jax.random.uniform, choice.shape, near.dtype, context, self.k + turn)
        is_best = choice == jnp.argmax(near, axis=-1, keepdims=True)
        return jnp.where(is_best | (draw < _FULL_STEP), 1, _PART_STEP).astype(near.dtype)

    def _check(self, context: Context) -> None:
        if self.jitter < 0:
            raise UserError(f"router.jitter={self.jitter} must be at least 0")
        if context.num_experts < self.k:
            raise UserError(
                f"the router SparseMixer chooses {self.k} experts, of which "
                f"num_experts={context.num_experts} are too few"
            )
        if context.selection_bias is not None:
            raise UserError(
                "the router SparseMixer has no place for a selection bias: take LossFreeBias out "
                "of ffn.balance, or use the router TopK"
            )


def _drawn(
    draw: Callable[..., Array], shape: tuple[int, int], dtype: Any, context: Context, stream: int
) -> Float[Array, "T N"]:
    """Random numbers of `shape` `[T, N]`, each token's from its row's key and its place there."""
    keys = fold_in(fold_in(context.key, _STREAM), stream)  # [B]
    places = jnp.arange(context.token_mask.shape[1])
    one = lambda key, place: draw(jax.random.fold_in(key, place), shape[1:], dtype)
    in_row = lambda key: jax.vmap(functools.partial(one, key))(places)
    return jax.vmap(in_row)(keys).reshape(shape)


def example() -> SparseMixer:
    """A small instance, for the contract tests."""
    return SparseMixer(jitter=0.5)
