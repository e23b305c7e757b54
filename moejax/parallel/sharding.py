"""Which mesh axes split which logical axis, and what follows for arrays.

Layers name the axes of their parameters by what they mean ("embed", "heads", "expert"); this table
says what a mesh does with them. A name that is not in the table, and two names of one array that
claim the same mesh axis, are errors: silently replicated or gathered arrays are how a large run
loses its memory or its speed unnoticed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.errors import UserError

Names = tuple[str | None, ...]  # one per axis of an array; None: never split

# Experts have names of their own, so that the axis `expert` can split them by expert and everything
# else by width.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "tokens": ("data", "fsdp", "expert", "context"),  # batch and sequence as one axis
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "expert_mlp": ("tensor",),
    "layers": (),
    "whole": (),  # gathered, where None leaves it to the compiler
}


def partition_spec(
    names: Names, *, rules: dict[str, tuple[str, ...]] = RULES, what: str = "an array"
) -> PartitionSpec:
    """The partition spec of an array with these logical axes.

    Raises UserError where a name has no rule or a mesh axis would split two axes.
    """
    entries, owner = [], {}
    for name in names:
        if name is not None and name not in rules:
            raise UserError(
                f"{what} has the logical axis {name!r}, which has no rule: use one of "
                f"{', '.join(rules)}, or None for an axis that is never split"
            )
        axes = rules[name] if name is not None else ()
        for axis in axes:
            if axis in owner:
                raise UserError(
                    f"{what}: the mesh axis {axis!r} would split both {owner[axis]!r} and "
                    f"{name!r}; give one of them another logical axis"
                )
            owner[axis] = name
        entries.append(axes or None)
    return PartitionSpec(*entries)


def parameter_shardings(
    mesh: jax.sharding.Mesh, shapes: Any, names: Any, *, max_replicated: int
) -> Any:
    """The sharding of every parameter: a tree like `shapes`.

    Args:
      mesh: with the axes of `RULES`.
      shapes: tree of abstract arrays.
      names: the same tree with each array's logical axes, a tuple.
      max_replicated: bytes of a parameter that may lie whole on every one of several devices.

    Raises UserError where an axis does not divide, or a parameter is larger than that and whole.
    """

    def place(keys: Any, shape: Any, axes: Names) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        what = f"the parameter {path} {list(shape.shape)}"
        spec = partition_spec(axes, what=what)
        ways = [_ways(mesh, name) for name in axes]
        for size, name, parts in zip(shape.shape, axes, ways, strict=True):
            if size % parts:
                sizes = ", ".join(f"mesh.{a}={mesh.shape[a]}" for a in RULES[name])
                raise UserError(
                    f"{what}: its axis {name!r} of size {size} cannot be split {parts} ways "
                    f"({sizes}); change the mesh or that size"
                )
        num_bytes = shape.size * shape.dtype.itemsize
        if mesh.size > 1 and math.prod(ways) == 1 and num_bytes > max_replicated:
            raise UserError(
                f"{what} of {num_bytes / 2**20:.0f} MiB would lie whole on each of {mesh.size} "
                "devices: split it with mesh.fsdp, mesh.expert or mesh.tensor, or allow it with "
                f"mesh.max_replicated_bytes={num_bytes}"
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, shapes, names)


def _ways(mesh: Any, name: str | None) -> int:
    return 1 if name is None else math.prod(mesh.shape[axis] for axis in RULES[name])


def split_ways(name: str) -> int:
    """Into how many parts the mesh in use splits a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(mesh, name)


def is_split() -> bool:
    """Whether arrays here may lie on several devices: under a mesh, and not inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def constrain(x: Array, *names: str | None) -> Array:
    """`x` laid out by its logical axes, where a mesh is in use; a None is left to the compiler.

    An axis that does not divide is left to the compiler too.
    """
    if not is_split():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(names)
    free = PartitionSpec.UNCONSTRAINED
    fits = lambda size, name: name is not None and size % _ways(mesh, name) == 0
    entries = [
        entry if fits(size, name) else free
        for size, name, entry in zip(x.shape, names, spec, strict=True)
    ]
    return lax.with_sharding_constraint(x, PartitionSpec(*entries))


def once(x: Array, name: str) -> Array:
    """`x` on the first device of those that share the logical axis `name`, zero on the others.

    For what is added to a partial sum, such as a bias: inside a transport each device computes with
    its part of `expert_mlp`, and the results are summed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [a for a in RULES[name] if a in mesh.manual_axes and mesh.shape[a] > 1]
    for axis in axes:
        x = jax.numpy.where(lax.axis_index(axis) == 0, x, 0)
    return x
