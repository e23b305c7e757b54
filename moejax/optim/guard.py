"""Skips steps whose loss or gradient is not finite or is a spike, and counts them.

The rules, each of which answers a defect seen in other trainers:

- A step is judged by (loss, gradient norm, update norm) together: a finite loss with a NaN gradient
  is common, and an infinite update can come from finite gradients.
- Only accepted steps enter the window, so its statistics are finite for ever. (A NaN written into a
  window of 128 makes every comparison false and costs 129 steps.)
- A refused step is replaced by a select, never multiplied by 0: 0 * NaN is NaN.
- Everything freezes together (parameters, optimizer, router state, counters) except the position
  in the data, so that the same batch is not met again.
- The window is part of the training state and so of the checkpoint.
- Too many refusals in a row are no accident: the loop then rolls back (`exhausted`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardState:
    """What the guard remembers. Windows are rings over the accepted steps; unused slots are 0."""

    losses: Float[Array, " W"]
    grad_norms: Float[Array, " W"]
    num_accepted: Int[Array, ""]  # since the run began
    num_nonfinite: Int[Array, ""]  # steps refused because a value was NaN or infinite
    num_spikes: Int[Array, ""]  # steps refused because of a spike
    consecutive_skips: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Refuses a step that is not finite, or that rises too far above the recent accepted ones.

    A spike: the loss or the gradient norm exceeds the window's mean by more than `num_sigmas`
    standard deviations and by more than `min_rise` of the mean (without the latter, a window
    that hardly varies would call noise a spike). Falls are never spikes. The rule starts after
    `min_history` accepted steps; finiteness is checked from the first step on.
    """

    window: int = 64
    num_sigmas: float = 6.0
    min_rise: float = 0.1
    min_history: int = 16
    max_consecutive_skips: int = 16

    def __post_init__(self):
        if not 2 <= self.min_history <= self.window < math.inf:
            raise UserError(
                f"Guard: min_history={self.min_history} must be between 2 and window="
                f"{self.window}, which must be finite"
            )
        sound = 0 < self.num_sigmas < math.inf and 0 <= self.min_rise < math.inf
        if not (sound and 1 <= self.max_consecutive_skips < math.inf):
            raise UserError(
                f"Guard: num_sigmas={self.num_sigmas} must be above 0, min_rise={self.min_rise} "
                f"0 or more and max_consecutive_skips={self.max_consecutive_skips} at least 1, and "
                "all of them finite"
            )

    def init(self) -> GuardState:
        """The state before the first step. Each field is a buffer of its own (steps donate)."""
        return GuardState(
            losses=jnp.zeros(self.window, jnp.float32),
            grad_norms=jnp.zeros(self.window, jnp.float32),
            **{name: jnp.zeros((), jnp.int32) for name in _COUNTERS},
        )

    def decide(
        self, state: GuardState, loss, grad_norm, update_norm
    ) -> tuple[Bool[Array, ""], GuardState]:
        """(accept, new state) for one step's three scalars. Pure; runs under jit."""
        # float32, so that a value the window cannot hold counts as infinite.
        values = jnp.stack([jnp.asarray(v, jnp.float32) for v in (loss, grad_norm, update_norm)])
        finite = jnp.all(jnp.isfinite(values))
        history = jnp.minimum(state.num_accepted, self.window)
        spike = self._spike(state.losses, history, values[0])
        spike |= self._spike(state.grad_norms, history, values[1])
        spike &= finite
        accept = finite & ~spike
        slot = state.num_accepted % self.window
        new = GuardState(
            losses=jnp.where(accept, state.losses.at[slot].set(values[0]), state.losses),
            grad_norms=jnp.where(
                accept, state.grad_norms.at[slot].set(values[1]), state.grad_norms
            ),
            num_accepted=state.num_accepted + accept,
            num_nonfinite=state.num_nonfinite + ~finite,
            num_spikes=state.num_spikes + spike,
            consecutive_skips=jnp.where(accept, 0, state.consecutive_skips + 1),
        )
        return accept, new

    def exhausted(self, state: GuardState) -> Bool[Array, ""]:
        """True where more steps in a row were refused than allowed: roll back."""
        return state.consecutive_skips > self.max_consecutive_skips

    def _spike(self, window, history, value) -> Bool[Array, ""]:
        used = jnp.arange(self.window) < history
        count = jnp.maximum(history, 1)
        mean = jnp.sum(jnp.where(used, window, 0.0)) / count
        variance = jnp.sum(jnp.where(used, jnp.square(window - mean), 0.0)) / count
        limit = jnp.maximum(self.num_sigmas * jnp.sqrt(variance), self.min_rise * jnp.abs(mean))
        return (history >= self.min_history) & (value - mean > limit)


_COUNTERS = ("num_accepted", "num_nonfinite", "num_spikes", "consecutive_skips")


def select(accept: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the step is accepted, else `old`, leaf by leaf; both have one structure.

    A select, so that NaN in the refused tree reaches nothing.
    """
    return jax.tree.map(lambda n, o: jnp.where(accept, n, o), new, old)
