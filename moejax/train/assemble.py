"""Puts a model, an optimiser and a mesh together into what a run executes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import ArrayLike, Int

from moejax.experiment import Experiment
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.optim import freeze
from moejax.train import layout
from moejax.train.state import TrainState, init_state, with_leaves
from moejax.train.step import Step, jit_step, make_train_step
from moejax.types import named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
    """A run on its mesh, ready to start.

    Attributes:
      fresh: makes the initial state, from the given variables where there are any; not compiled
        and not laid out.
      variables: where each leaf of the model's variables lies.
      shardings: where each leaf of the state lies.
      train_step: compiled; takes a batch that is laid out by `layout.global_batch`.
    """

    fresh: Callable[..., TrainState]
    variables: Variables
    shardings: TrainState
    train_step: Step

    def initial_state(self, variables: Variables | None = None) -> TrainState:
        """The fresh state, each leaf made where it lies.

        Of `variables` given, the frozen ones become part of it as they are, without a copy; those
        that are not given are fresh.
        """
        if variables is None:
            return jax.jit(self.fresh, out_shardings=self.shardings)()
        frozen = {f"frozen/{p}": leaf for p, leaf in named_leaves(parameters(variables)).items()}
        made = {p: at for p, at in named_leaves(self.shardings).items() if p not in frozen}

        def fresh(given: Variables) -> dict[str, jax.Array]:
            leaves = named_leaves(self.fresh(given))
            return {p: leaves[p] for p in made}

        leaves = jax.jit(fresh, out_shardings=made)(variables)
        return with_leaves(self.shardings, frozen | leaves)


def assemble(
    experiment: Experiment,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    token_bytes: Int[ArrayLike, "V"],
) -> Assembled:
    """Everything here must be used under `jax.set_mesh(mesh)`."""

    def fresh(given: Variables | None = None) -> TrainState:
        return init_state(
            model,
            optimizer,
            experiment.guard,
            experiment.seed,
            trainable=experiment.trainable,
            variables=given,
        )

    variables = experiment.variable_shardings(model, mesh)
    shardings: Any = layout.state_shardings(jax.eval_shape(fresh), variables, mesh)
    step = make_train_step(
        model,
        experiment.objective,
        optimizer,
        experiment.guard,
        num_microbatches=experiment.num_microbatches,
        token_bytes=jax.numpy.asarray(token_bytes),
        only=freeze.only_experts(experiment.chosen_experts(model)),
    )
    return Assembled(
        fresh=fresh,
        variables=variables,
        shardings=shardings,
        train_step=jit_step(step, shardings=(shardings, layout.replicated(mesh))),
    )
