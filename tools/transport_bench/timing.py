"""Wall time of one layer, forward and backward, on simulated devices: only ratios mean anything."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from transport_bench import layer


def routing(kind: str, shape: layer.Shape, num_devices: int) -> np.ndarray:
    """Chosen experts `[T, K]`: `balanced` (all equally often) or `one hot device` (the first)."""
    total, experts = shape.tokens * num_devices, shape.num_experts
    if kind == "balanced":
        slot = np.arange(total * shape.num_choices, dtype=np.int32)
        return (slot % experts).reshape(total, -1)
    if kind != "one hot device":
        raise ValueError(f"no routing of the name {kind!r}")
    rng = np.random.default_rng(0)
    owned = experts // num_devices
    return np.stack([rng.permutation(owned)[: shape.num_choices] for _ in range(total)]).astype(
        np.int32
    )


def seconds(transport: Any, shape: layer.Shape, kind: str, *, calls: int) -> float:
    """The median of `calls` calls, after one that does not count."""
    devices = jax.devices()
    program = layer.compiled(transport, shape, devices)
    given = _operands(program, shape, kind, len(devices))
    took = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(*given))
        took.append(time.perf_counter() - start)
    return float(np.median(took[1:]))


def _operands(program, shape: layer.Shape, kind: str, num_devices: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    like = jax.tree.leaves(program.input_shardings[0])[0]
    abstract = layer.arguments(shape, like.mesh)

    def draw(a: jax.ShapeDtypeStruct) -> jax.Array:
        if a.dtype == np.int32:
            value = routing(kind, shape, num_devices)
        else:
            value = rng.standard_normal(a.shape, np.float32) / np.sqrt(shape.d_model)
        return jax.device_put(value.astype(a.dtype), a.sharding)

    return jax.tree.map(draw, abstract)
