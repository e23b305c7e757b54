"""Puts a model, an optimiser and a mesh together into what a run executes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import ArrayLike, Int

from moejax.experiment import Experiment
from moejax.models.transformer import Transformer
from moejax.train import layout
from moejax.train.state import TrainState, init_state
from moejax.train.step import Step, jit_step, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
    """A run on its mesh, ready to start.

    Attributes:
      fresh: makes the initial state; not compiled and not laid out.
      shardings: where each leaf of the state lies.
      train_step: compiled; takes a batch that is laid out by `layout.global_batch`.
    """

    fresh: Callable[[], TrainState]
    shardings: TrainState
    train_step: Step

    def initial_state(self) -> TrainState:
        """The fresh state, each leaf made where it lies."""
        return jax.jit(self.fresh, out_shardings=self.shardings)()


def assemble(
    experiment: Experiment,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    token_bytes: Int[ArrayLike, "V"],
) -> Assembled:
    """Everything here must be used under `jax.set_mesh(mesh)`."""

    def fresh() -> TrainState:
        return init_state(model, optimizer, experiment.guard, experiment.seed)

    variables = experiment.variable_shardings(model, mesh)
    shardings: Any = layout.state_shardings(jax.eval_shape(fresh), variables, mesh)
    step = make_train_step(
        model,
        experiment.objective,
        optimizer,
        experiment.guard,
        num_microbatches=experiment.num_microbatches,
        token_bytes=jax.numpy.asarray(token_bytes),
    )
    return Assembled(
        fresh=fresh,
        shardings=shardings,
        train_step=jit_step(step, shardings=(shardings, layout.replicated(mesh))),
    )
