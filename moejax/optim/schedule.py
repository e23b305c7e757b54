"""Learning rates over a run: warm-up then cosine, and warm-up, stable, decay.

A schedule never owns the number of steps: it receives it in `build(steps)`, so that the run's
length is written at one place. Update number t (from 0) uses `rate(t)`. The warm-up's first
update already moves (a rate of 0 would waste a step), and the decay would reach its final value at
t = steps, one after the last update; later t keep the final value.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import optax

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up to `peak`, then half a cosine to `final_fraction * peak`.

    Source: Loshchilov and Hutter 2017 (SGDR), without restarts.
    """

    peak: float
    warmup_steps: int
    final_fraction: float = 0.1

    def build(self, steps: int) -> optax.Schedule:
        """The rate of update t in a run of `steps` updates. Raises UserError where it cannot."""
        _check(self, steps)
        warm, length = self.warmup_steps, max(steps - self.warmup_steps, 1)

        def rate(count):
            t = jnp.asarray(count, jnp.float32)
            progress = jnp.clip((t - warm) / length, 0.0, 1.0)
            cosine = 0.5 * (1.0 + jnp.cos(math.pi * progress))
            share = self.final_fraction + (1.0 - self.final_fraction) * cosine
            return self.peak * jnp.where(t < warm, (t + 1.0) / (warm + 1.0), share)

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay: linear warm-up, a constant `peak`, a linear fall at the end.

    The fall takes the last `decay_fraction` of the run and ends at `final_fraction * peak`.
    Source: Hu et al. 2024 (MiniCPM, section 4), with the linear fall of Hägele et al. 2024.
    """

    peak: float
    warmup_steps: int
    decay_fraction: float = 0.2
    final_fraction: float = 0.0

    def build(self, steps: int) -> optax.Schedule:
        """The rate of update t in a run of `steps` updates. Raises UserError where it cannot."""
        _check(self, steps)
        length = round(self.decay_fraction * steps)
        if not 0.0 <= self.decay_fraction <= 1.0 or self.warmup_steps + length > steps:
            raise UserError(
                f"WSD: warmup_steps={self.warmup_steps} and decay_fraction={self.decay_fraction} "
                f"({length} steps) do not fit into {steps} steps; make one of them smaller"
            )
        start = steps - length

        def rate(count):
            t = jnp.asarray(count, jnp.float32)
            progress = jnp.clip((t - start) / max(length, 1), 0.0, 1.0)
            share = 1.0 + (self.final_fraction - 1.0) * progress
            warm = (t + 1.0) / (self.warmup_steps + 1.0)
            return self.peak * jnp.where(t < self.warmup_steps, warm, share)

        return rate


def _check(schedule: WarmupCosine | WSD, steps: int) -> None:
    name = type(schedule).__name__
    if steps < 1:
        raise UserError(f"{name}: steps={steps}; a run needs at least one step")
    if not 0 <= schedule.warmup_steps <= steps:
        raise UserError(
            f"{name}: warmup_steps={schedule.warmup_steps} must be between 0 and the run's "
            f"{steps} steps; lower warmup_steps or raise steps"
        )
    if not (math.isfinite(schedule.peak) and schedule.peak >= 0):
        raise UserError(f"{name}: peak={schedule.peak} must be a finite learning rate of 0 or more")
    if not 0.0 <= schedule.final_fraction <= 1.0:
        raise UserError(
            f"{name}: final_fraction={schedule.final_fraction} must lie between 0 and 1 "
            "(a share of the peak)"
        )
