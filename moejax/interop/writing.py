"""Variables into tensors, each computed when its turn to be written comes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.interop.description import Description
from moejax.interop.mapping import Leaf, Part, by_tensor, leaves
from moejax.interop.tensor_files import DTYPES
from moejax.interop.tensor_writer import Tensor
from moejax.interop.views import copy_into
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.models.variables import check_narrowed
from moejax.types import named_leaves

_WEIGHTS = {"params", "router_state"}
_STATE = "router_state/"


def tensors_of(
    model: Transformer, variables: Variables, description: Description, dtype: str | None
) -> list[Tensor]:
    """Every tensor of the described architecture, layer by layer.

    Raises:
      UserError: `variables` do not fit the model, a dtype cannot be stored, or the architecture
        has a tensor for which the model has nothing.
    """
    stored = leaves(model, description.architecture)
    tensors = by_tensor(stored)
    needed = by_tensor(leaves(description.model, description.architecture))
    if lost := sorted(needed.keys() - tensors.keys()):
        raise UserError(
            f"{description.architecture.class_name} has a tensor {lost[0]} and this model nothing "
            "for it: state the balance rule that keeps it (LossFreeBias)"
        )
    arrays = _arrays(variables, stored)
    return [_tensor(name, parts, arrays, dtype) for name, parts in tensors.items()]


def _arrays(variables: Variables, stored: list[Leaf]) -> dict[str, Any]:
    """{path: array} of the leaves to be stored, all there and of the model's shapes."""
    if other := sorted(variables.keys() - _WEIGHTS - {"cache"}):
        raise UserError(
            f"the collection {other[0]} has no place in a Hugging Face model: merge it into "
            "params, or leave it out to save the model without it"
        )
    arrays = named_leaves(variables)
    for leaf in stored:
        if leaf.path not in arrays:
            raise UserError(f"variables lack the leaf {leaf.path}")
        if arrays[leaf.path].shape != leaf.shape:
            raise UserError(
                f"the leaf {leaf.path} has shape {list(arrays[leaf.path].shape)}, but the model "
                f"asks for {list(leaf.shape)}"
            )
    known = {leaf.path for leaf in stored}
    for path in arrays:
        if path.startswith("params/") and path not in known:
            raise UserError(f"the leaf {path} is none of the model's")
    return arrays


def _tensor(name: str, parts: list[Part], arrays: dict[str, Any], dtype: str | None) -> Tensor:
    """The tensor that `parts` fill, in `dtype` or in the leaves' own."""
    own = functools.reduce(jnp.promote_types, [arrays[part.leaf].dtype for part in parts])
    keeps = dtype is None or parts[0].leaf.startswith(_STATE)
    target = np.dtype(own if keeps else jnp.dtype(dtype))
    if target not in DTYPES.values():
        raise UserError(
            f"the leaf {parts[0].leaf} has dtype {target}, which checkpoints do not have: give "
            "dtype='float32' or a smaller one"
        )

    def compute() -> np.ndarray:
        out = np.empty(parts[0].tensor_shape, target)
        for part in parts:
            array = arrays[part.leaf]
            whole = np.asarray(array) if isinstance(array, jax.Array) else array
            _fill(part.view(out), whole, part, target)
        return out

    return Tensor(name=name, shape=parts[0].tensor_shape, dtype=target, compute=compute)


def _fill(view: Any, array: Any, part: Part, dtype: np.dtype) -> None:
    """`view[...] = array[part.index]`, of stacked experts one at a time.

    So of a layer's fused experts, the largest of tensors, only the tensor itself is in memory.
    """
    if not (isinstance(view, np.ndarray) and view.ndim > 2):
        copy_into(view, _cast(array[part.index], part, dtype))
        return
    for expert, place in enumerate(view):
        copy_into(place, _cast(array[(*part.index, expert)], part, dtype))


def _cast(values: np.ndarray, part: Part, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`; UserError where a finite one becomes infinite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    check_narrowed(values, cast, f"the leaf {part.leaf} (tensor {part.tensor})")
    return cast
