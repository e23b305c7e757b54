"""A ring of shared memory slots that one warpgroup fills and others empty, without end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Ring:
    """Every task takes `steps` slots, and the next task goes on in the slot after.

    Attributes:
      stages: slots.
      steps: of a task.
      full: a barrier per slot, on which the copies into it arrive.
      empty: a barrier per slot, on which those who have read it arrive.
    """

    stages: int
    steps: int
    full: Any
    empty: Any

    def _slot(self, turn: Array) -> Array:
        return lax.rem(turn, jnp.asarray(self.stages, turn.dtype))

    def fill(self, nth: Array) -> Callable[[Callable[..., None]], None]:
        """Runs `body(step, slot, barrier)`, which copies to the slot, for the nth task's steps."""

        def run(body):
            @pl.loop(0, self.steps)
            def _(step):
                turn = nth * self.steps + step
                slot = self._slot(turn)

                @pl.when(turn >= self.stages)
                def _():
                    plgpu.barrier_wait(self.empty.at[slot])

                body(step, slot, self.full.at[slot])

        return run

    def finish(self, num_tasks: Array) -> None:
        """Waits, after `num_tasks` tasks have been filled, until all slots have been read."""

        @pl.loop(0, self.stages)
        def _(ahead):
            turn = num_tasks * self.steps + ahead

            @pl.when(turn >= self.stages)
            def _():
                plgpu.barrier_wait(self.empty.at[self._slot(turn)])

    def drain(self, nth: Array, products: int) -> Callable[[Callable[..., None]], None]:
        """Runs `body(slot)`, which starts `products` products, for the nth task's steps.

        A slot is given back when the products of the step after have been started, so that the
        tensor cores always have the next ones waiting. `release_last` gives back the task's last.
        """

        def run(body):
            @pl.loop(0, self.steps)
            def _(step):
                turn = nth * self.steps + step
                plgpu.barrier_wait(self.full.at[self._slot(turn)])
                body(self._slot(turn))
                plgpu.wgmma_wait(products)  # those of the step before are done

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(self.empty.at[self._slot(turn - 1)])

        return run

    def release_last(self, nth: Array) -> None:
        """Gives back the nth task's last slot, once its products are done."""
        plgpu.barrier_arrive(self.empty.at[self._slot(nth * self.steps + self.steps - 1)])
