"""Where a run's arrays lie on its mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.optim.paths import map_named
from moejax.parallel.sharding import partition_spec
from moejax.types import Batch, named_leaves


def state_shardings(state: Any, variables: Any, mesh: jax.sharding.Mesh) -> Any:
    """The sharding of every leaf of a `TrainState`.

    Whatever in the optimiser's state has a parameter's path at the end of its own and its shape,
    as moments have, lies as that parameter does; everything else is small and on every device.
    """
    placed = named_leaves(variables)
    shapes = {path: leaf.shape for path, leaf in named_leaves(state).items()}

    def place(path: str, leaf: Any) -> NamedSharding:
        for start in _suffixes(path):
            sharding = placed.get(f"params/{start}") or placed.get(start)
            if sharding is not None and shapes.get(f"params/{start}", leaf.shape) == leaf.shape:
                return sharding
        return replicated(mesh)

    return map_named(place, state)


def _suffixes(path: str):
    """`a/b/c`, `b/c`, `c`."""
    while path:
        yield path
        path = path.partition("/")[2]


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """A batch of host arrays `[B, S]`, the same in every process, as arrays split over the mesh."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "sequence")))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    place = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])
    return jax.tree.map(place, batch)


def with_sharding(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays that say where they lie."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def one_device(shapes: Any) -> Any:
    """`with_sharding` for a single device, the first."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes)
