"""Which axis of each parameter counts experts."""

from __future__ import annotations

import jax

from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.types import named_leaves


def expert_axes(model: Transformer) -> dict[str, int | None]:
    """{path of a parameter: its axis of experts, or None}."""
    axis = lambda names: names.index("expert") if "expert" in names else -1
    is_names = lambda leaf: isinstance(leaf, tuple)
    axes = jax.tree.map(axis, parameters(model.logical_axes()), is_leaf=is_names)
    return {path: None if axis < 0 else axis for path, axis in named_leaves(axes).items()}
