"""An adapted model as a plain one: every adapted matrix becomes the one that it stands for.

Hu et al., arXiv 2106.09685, section 4.1: W + s A B costs nothing when it is used. An adapter
whose matrix differs from token to token has none (`layers.linear.matrix_of`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.errors import UserError
from moejax.layers.linear import matrix_of
from moejax.models.adapter import Adapter
from moejax.models.output import Variables
from moejax.models.stack import rows_elsewhere, stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import ADAPTERS, check_narrowed, collections, parameters
from moejax.types import at_least_f32, named_leaves, tree_of

Index = tuple[int, ...]


def merge(model: Transformer, variables: Variables) -> tuple[Transformer, Variables]:
    """(the model without its adapter, variables with which it computes the same).

    Raises UserError where the adapter is no matrix.
    """
    plain = dataclasses.replace(model, adapter=None)
    leaves = merged_leaves(model, named_leaves(parameters(variables)))
    own = tree_of({path: jnp.asarray(leaf[()]) for path, leaf in leaves.items()})
    others = {name: tree for name, tree in variables.items() if name not in ("params", ADAPTERS)}
    together = _restacked(collections(own) | others, model, plain)
    return plain, together


def unmerge(model: Transformer, variables: Variables, adapters: Variables) -> Variables:
    """The variables of the adapted model that `merge` made those of the plain one from.

    Kernels are theirs to the rounding of the sum that is taken back.

    Args:
      model: with its adapter.
      variables: of the model without it.
      adapters: the collection `lora` of the adapted model.

    Raises UserError where the adapter is no matrix.
    """
    plain = dataclasses.replace(model, adapter=None)
    own = _restacked(variables, plain, model)
    kernels = named_leaves(own["params"])
    nothing = {path: jnp.zeros(x.shape, at_least_f32(x.dtype)) for path, x in kernels.items()}
    added = merged_leaves(model, nothing | named_leaves({ADAPTERS: adapters}))
    back = {
        path: x if added[path] is nothing[path] else (x - added[path][()]).astype(x.dtype)
        for path, x in kernels.items()
    }
    return own | {"params": tree_of(back), ADAPTERS: adapters}


def merged_leaves(
    model: Transformer, leaves: Mapping[str, Any], *, dtype: Any = None
) -> dict[str, Any]:
    """{path: leaf} without the adapter's, of `models.variables.parameters` of the adapted model.

    Leaves are arrays, or whatever has shape and dtype and gives the numbers at an index. A merged
    matrix is made when it is asked for, from what is read of its kernel alone, in at least float32,
    and rounded once, to `dtype` or to that of its kernel; layers stay stacked as they are.
    """
    own = {path: leaf for path, leaf in leaves.items() if not path.startswith(f"{ADAPTERS}/")}
    added: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        if path not in own:
            kernel, name = _adapted_by(path.removeprefix(f"{ADAPTERS}/"), own)
            added.setdefault(kernel, {})[name] = leaf
    for path, parts in added.items():
        is_linear = path.endswith("/kernel")
        matrix = _matrix_of_linear if is_linear else _matrices_of_experts
        own[path] = _Merged(functools.partial(matrix, model.adapter), own[path], parts, dtype)
    return own


def _adapted_by(path: str, own: Mapping[str, Any]) -> tuple[str, str]:
    """(the kernel that the adapter's leaf `path` is for, the leaf's name at its module)."""
    module, _, name = path.rpartition("/")
    projection, _, factor = name.rpartition("_")
    if f"{module}/{projection}" in own:  # of routed experts
        return f"{module}/{projection}", factor
    while module and f"{module}/kernel" not in own:
        module = module.rpartition("/")[0]
    if not module:
        raise UserError(
            f"the adapter's parameter {path} belongs to no single matrix, so it cannot be merged: "
            "use the model as it is"
        )
    return f"{module}/kernel", path.removeprefix(f"{module}/")


def merged_in_checkpoint(
    model: Transformer, stored: Mapping[str, Any], *, dtype: Any
) -> dict[str, Any]:
    """`merged_leaves` of a checkpoint, whose paths begin with the collection."""
    prefix = "params/"
    own = {p.removeprefix(prefix): leaf for p, leaf in stored.items() if p.startswith(prefix)}
    others = {p: leaf for p, leaf in stored.items() if not p.startswith(prefix)}
    merged = merged_leaves(model, own, dtype=dtype)
    return {f"{prefix}{path}": leaf for path, leaf in merged.items()} | others


class _Merged:
    """The merged kernels `[count, ...]` of one projection in layers of a kind."""

    def __init__(
        self, matrix: Callable[..., Array], kernel: Any, parts: Mapping[str, Any], dtype: Any
    ):
        self.shape, self.dtype = kernel.shape, np.dtype(kernel.dtype if dtype is None else dtype)
        self._matrix, self._kernel = matrix, kernel
        self._parts = {name: np.asarray(part[()]) for name, part in parts.items()}  # small

    def __getitem__(self, index: Index) -> np.ndarray:
        if not index:
            return np.stack([self[(row,)] for row in range(self.shape[0])])
        wide = at_least_f32(self.dtype)
        parts = {name: jnp.asarray(_at(part, index), wide) for name, part in self._parts.items()}
        matrix = self._matrix(jnp.asarray(self._kernel[index], wide), parts)
        merged = np.asarray(matrix.astype(self.dtype))
        check_narrowed(np.asarray(matrix), merged, "a merged kernel")
        return merged


def _at(part: np.ndarray, index: Index) -> np.ndarray:
    """What belongs to one layer, or to one expert of it, for whom there may be a shared one."""
    row, *expert = index
    own = part[row]
    return own[expert[0] if own.shape[0] > 1 else 0] if expert else own


def _matrix_of_linear(adapter: Adapter, kernel: Array, parts: dict[str, Array]) -> Array:
    linear = adapter.linear.clone(features=kernel.shape[-1], targets=None)
    bound = linear.bind({"params": {"kernel": kernel}, ADAPTERS: tree_of(parts)})
    return matrix_of(bound, kernel.dtype)


def _matrices_of_experts(adapter: Adapter, kernel: Array, parts: dict[str, Array]) -> Array:
    return adapter.experts.merged(kernel, **parts)


def _restacked(variables: Variables, old: Transformer, new: Transformer) -> Variables:
    """The variables of `old` with layers stacked as `new` has them."""
    layers, wanted = stacked_layers(old.segments), stacked_layers(new.segments)
    if layers == wanted:
        return variables
    rows, out = rows_elsewhere(wanted, layers), {}
    for collection, trees in variables.items():
        flat = {name: named_leaves(trees[name]) for name in layers if name in trees}
        stacked = {
            f"{name}/{path}": jnp.stack([flat[source][path][row] for source, row in own])
            for name, own in rows.items()
            for path in flat.get(own[0][0], {})
        }
        rest = {name: tree for name, tree in trees.items() if name not in layers}
        out[collection] = rest | tree_of(stacked)
    return out
