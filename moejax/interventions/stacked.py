"""From one intervention per layer to the stacks that a model's `apply` takes."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.models.transformer import Transformer

Intervention = TypeVar("Intervention")


def stacked(
    model: Transformer, by_layer: dict[int, Intervention], *, elsewhere: Intervention
) -> dict[str, Intervention]:
    """`{segment: intervention with arrays [count, ...]}` for `model.apply(intervention=...)`.

    Args:
      model: whose MoE layers they are for.
      by_layer: `{global layer index: intervention}`, all of one class and of equal shapes.
      elsewhere: for the MoE layers that `by_layer` does not name; one that changes nothing.

    Raises:
      UserError: a layer that is no MoE layer of the model.
    """
    if unknown := sorted(by_layer.keys() - model.moe_layers.keys()):
        known = list(model.moe_layers)
        raise UserError(
            f"layer {unknown[0]} has no router: the MoE layers are {known[0]} to {known[-1]}"
            if known
            else "the model has no MoE layer"
        )
    rows: dict[str, list[Any]] = {}
    for layer, (segment, _) in model.moe_layers.items():
        rows.setdefault(segment, []).append(by_layer.get(layer, elsewhere))
    return {name: jax.tree.map(lambda *x: jnp.stack(x), *own) for name, own in rows.items()}
