"""The collections of a model's variables, and the one tree of all that can train.

`params` holds the model's own parameters, the same with and without adapters; what adapters add
lies in the collection `lora`. Whoever trains, freezes, counts or stores parameters sees both as one
tree, in which the adapters are below the key `lora`: `lora/layers_0/attention/query/a` is a path
for `trainable`, and `params/lora/...` one in a checkpoint.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.layers.adapter_leaf import ADAPTERS
from moejax.models.output import Variables


def parameters(variables: Variables) -> dict[str, Any]:
    """Everything of `variables` that can train."""
    adapters = variables.get(ADAPTERS)
    return variables["params"] | ({ADAPTERS: adapters} if adapters else {})


def collections(parameters: dict[str, Any]) -> Variables:
    """The collections that `parameters` were made of."""
    own = {name: tree for name, tree in parameters.items() if name != ADAPTERS}
    adapters = {ADAPTERS: parameters[ADAPTERS]} if ADAPTERS in parameters else {}
    return {"params": own} | adapters


def check_narrowed(values: Any, narrowed: Any, what: str) -> None:
    """Raises UserError where `what`, finite in `values`, became infinite in another dtype."""
    if (np.isfinite(values) & ~np.isfinite(narrowed)).any():
        raise UserError(
            f"{what} holds values too large for {narrowed.dtype}: save in bfloat16 or float32"
        )


def cast_floats(tree: Any, dtype: Any) -> Any:
    """The tree with its floating leaves in `dtype`."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)
