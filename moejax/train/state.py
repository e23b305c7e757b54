"""What a training step takes and returns: everything it changes, and the parameters it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.models.variables import collections, parameters
from moejax.optim import freeze
from moejax.optim.guard import Guard, GuardState
from moejax.types import named_leaves, tree_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state between steps.

    `step` counts every step attempted and is the position in the data: step t trains on batch t.
    A step that the guard refuses moves `step` and nothing else.

    `params` are the parameters that train and `frozen` the others: both have the structure of
    `models.variables.parameters`, with None for the other's leaves (`optim/freeze.py`).
    """

    step: Int[Array, ""]
    params: Any
    frozen: Any
    router_state: Any
    opt_state: Any
    guard: GuardState
    key: Array

    @property
    def variables(self) -> Variables:
        """The model's, trained and frozen together."""
        return variables_of(freeze.merge(self.params, self.frozen), self.router_state)


def variables_of(params: Any, router_state: Any) -> Variables:
    """The model's variables, of all its parameters and its router state."""
    return collections(params) | {"router_state": router_state}


def changing(state: TrainState) -> dict[str, Any]:
    """{path: leaf} of what steps change, which is what checkpoints store: all but `frozen`."""
    return {p: leaf for p, leaf in named_leaves(state).items() if not p.startswith("frozen/")}


def with_leaves(state: TrainState, leaves: dict[str, Any]) -> TrainState:
    """`state` with the leaves at the given paths replaced."""
    return jax.tree.unflatten(
        jax.tree.structure(state), [leaves.get(p, x) for p, x in named_leaves(state).items()]
    )


def init_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    guard: Guard,
    seed: Int[Array, ""] | int,
    *,
    trainable: tuple[str, ...] = freeze.TRAIN_ALL,
    variables: Variables | None = None,
) -> TrainState:
    """The state before the first step; everything that is random comes from `seed`.

    The leaves in `variables` replace fresh ones. What trains is held in the model's
    `param_dtype`, what is frozen in the dtype in which it is given.
    """
    init_key, train_key = jax.random.split(jax.random.key(seed))
    variables = tree_of(named_leaves(model.init(init_key)) | named_leaves(variables or {}))
    params, frozen = freeze.split(parameters(variables), trainable)
    params = jax.tree.map(lambda x: x.astype(model.param_dtype), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        router_state=variables.get("router_state", {}),
        opt_state=optimizer.init(params),
        guard=guard.init(),
        key=train_key,
    )
