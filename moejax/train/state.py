"""Everything that a training step changes, and everything that a checkpoint stores."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moejax.models.transformer import Transformer
from moejax.optim.guard import Guard, GuardState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state between steps.

    `step` counts every step attempted and is the position in the data: step t trains on batch t.
    A step that the guard refuses moves `step` and nothing else.
    """

    step: Int[Array, ""]
    params: Any
    router_state: Any
    opt_state: Any
    guard: GuardState
    key: Array


def init_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    guard: Guard,
    seed: Int[Array, ""] | int,
) -> TrainState:
    """A fresh state; parameters and everything random in training come from `seed`."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        router_state=variables.get("router_state", {}),
        opt_state=optimizer.init(variables["params"]),
        guard=guard.init(),
        key=train_key,
    )
