"""Top-k routing: the router of Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2/V3, GLM-4.5 and gpt-oss.

Shazeer et al., arXiv 1701.06538; sigmoid scores, selection bias and node-limited groups from
DeepSeek-V3, arXiv 2412.19437. Four stages: score, adjust (selection only), select, combine.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.routers.selection import intervened, own_scores, select
from moejax.types import Context, Routing, at_least_f32


class TopK(nn.Module):
    """Selects the k experts of highest (adjusted) score and combines with their scores.

    Attributes:
      k: experts per token. Ties go to the lower expert id.
      score: `softmax` over the experts, or an independent `sigmoid` for each.
      normalise: `before` top-k leaves the selected scores as they are (OLMoE, DeepSeek-V2);
        `after` divides them by their sum (Mixtral, DeepSeek-V3; for softmax this equals a softmax
        over the k selected logits, gpt-oss).
      scale: multiplies the combine weights last.
      num_groups: experts are split into this many equal groups of consecutive ids, of which only
        the `num_groups_kept` best can be selected from; 1 is no limit.
      group_score: a group's score is its `max` (DeepSeek-V2), or the sum of its two best (`top2`,
        DeepSeek-V3), both of the adjusted scores.
      use_bias: a trained bias on the logits (gpt-oss).

    `context.selection_bias [E]`, kept by a loss-free balance rule, is added to the scores for
    selection and never enters the weights. `Routing.probs` is the softmax, or the sigmoid scores
    over their sum. Logits are in at least float32; their product is as precise as JAX makes
    products of float32, by default one pass of bfloat16 on TPUs and TF32 on GPUs
    (`jax_default_matmul_precision`).
    """

    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: Literal["before", "after"] = "after"
    scale: float = 1.0
    num_groups: int = 1
    num_groups_kept: int = 1
    group_score: Literal["max", "top2"] = "top2"
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = initializers.normal(0.02)

    @property
    def constant_weights(self) -> str:
        """Why the weights do not depend on the logits, so that no gradient comes; empty if not."""
        if self.k > 1 or self.normalise == "before":
            return ""
        return "router.k=1 divides every weight by itself: set router.normalise=before"

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], context: Context) -> tuple[Routing, None]:
        num_experts = context.num_experts
        self._check(num_experts)
        dtype = at_least_f32(x.dtype)
        init = nn.with_logical_partitioning(self.kernel_init, ("embed", None))
        kernel = self.param("kernel", init, (x.shape[-1], num_experts), jnp.float32)
        logits = x.astype(dtype) @ kernel.astype(dtype)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(initializers.zeros, (None,))
            logits = logits + self.param("bias", zeros, (num_experts,), jnp.float32).astype(dtype)
        logits = intervened(logits, context)

        scores = jax.nn.softmax(logits) if self.score == "softmax" else jax.nn.sigmoid(logits)
        # The logits order the experts as the scores do, and better: scores round to ties where
        # they saturate. What adds to the scores or to groups of them needs the scores.
        alone = context.selection_bias is None and self.num_groups == 1
        adjusted = jax.lax.stop_gradient(logits if alone else scores)
        if context.selection_bias is not None:
            adjusted = adjusted + context.selection_bias
        if self.num_groups > 1:
            adjusted = self._limit_groups(adjusted)
        experts = select(adjusted, self.k, context)
        weights = own_scores(scores, experts)
        if self.normalise == "after":
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        probs = scores
        if self.score == "sigmoid":
            probs = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        routing = Routing(
            experts=experts,
            weights=weights * self.scale,
            probs=probs,
            logits=logits,
            extras={},
        )
        return routing, None

    def _limit_groups(self, adjusted: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """-inf for every expert outside the best `num_groups_kept` groups."""
        grouped = adjusted.reshape(adjusted.shape[0], self.num_groups, -1)  # [T, groups, E/groups]
        best = jax.lax.top_k(grouped, 1 if self.group_score == "max" else 2)[0].sum(-1)
        _, kept = jax.lax.top_k(best, self.num_groups_kept)
        allowed = (kept[:, :, None] == jnp.arange(self.num_groups)).any(axis=1)
        return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(adjusted.shape)

    def _check(self, num_experts: int) -> None:
        _check_choice("score", self.score, ("softmax", "sigmoid"))
        _check_choice("normalise", self.normalise, ("before", "after"))
        _check_choice("group_score", self.group_score, ("max", "top2"))
        if not 1 <= self.k <= num_experts:
            raise UserError(f"router.k={self.k} must be between 1 and num_experts={num_experts}")
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise UserError(
                f"router.num_groups={self.num_groups} does not divide num_experts={num_experts}"
            )
        if not 1 <= self.num_groups_kept <= self.num_groups:
            raise UserError(
                f"router.num_groups_kept={self.num_groups_kept} must be between 1 and "
                f"router.num_groups={self.num_groups}"
            )
        group = num_experts // self.num_groups
        if self.k > self.num_groups_kept * group:
            raise UserError(
                f"router.num_groups_kept={self.num_groups_kept} of {self.num_groups} groups leaves "
                f"{self.num_groups_kept * group} experts for router.k={self.k}"
            )
        if self.num_groups > 1 and self.group_score == "top2" and group < 2:
            raise UserError(
                f"router.group_score='top2' needs groups of two experts or more; "
                f"num_groups={self.num_groups} of num_experts={num_experts} have {group}: use 'max'"
            )


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"router.{field}={value!r} must be one of {', '.join(allowed)}")


def example() -> TopK:
    """A small instance, for the contract tests."""
    return TopK(k=2)
