"""Layers in sequence: which layer is what, and one `lax.scan` per run of like layers.

Parameters of like layers are stacked on a leading axis whatever the scan does, and layer l is
initialised from fold_in(key, l). So scanned, unrolled and segmented stacks have the same
parameters and the same results, and nothing depends on how the layers were grouped.

The block is applied as a pure function (`block.apply`) inside a plain `jax.lax.scan`: every
collection is an ordinary scanned array, so none can be dropped or shared by a lifting rule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.layers import reports
from moejax.layers.reports import REPORTS, Report
from moejax.layers.row_keys import fold_in
from moejax.models.output import Passed
from moejax.types import Context, Stats, add_terms

# Rematerialisation by name: what the backward pass may keep of a layer.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep everything; no recomputation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the layer's input
    "dots": jax.checkpoint_policies.checkpoint_dots,  # keep matmul results
    "dots_without_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's block and what distinguishes it: equal `kind` means it can be scanned with."""

    block: nn.Module
    kind: tuple[Any, ...]
    window: int | None


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` repetitions of `layers`, the first of which is global layer `start`.

    Member j of the unit holds layers start + j, start + j + period, ...; its stacked parameters
    are named `layers_<start + j>`.
    """

    start: int
    count: int
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"layers_{self.start + j}" for j in range(len(self.layers)))

    def indices(self, member: int) -> list[int]:
        """Global layer indices of one member, in order."""
        return [self.start + member + r * len(self.layers) for r in range(self.count)]


def segments(layers: Sequence[Layer]) -> list[Segment]:
    """Groups layers into as few scanned runs as possible; a run may repeat a unit of several."""
    kinds = [layer.kind for layer in layers]
    out, start = [], 0
    while start < len(layers):
        best = (1, 1)  # (period, count)
        for period in range(1, (len(layers) - start) // 2 + 1):
            count = 1
            while kinds[start + count * period :][:period] == kinds[start : start + period]:
                count += 1
            if count > 1 and period * count > best[0] * best[1]:
                best = (period, count)
        period, count = best
        out.append(Segment(start, count, tuple(layers[start : start + period])))
        start += period * count
    return out


def stacked_layers(layout: Sequence[Segment]) -> dict[str, tuple[int, ...]]:
    """{name of stacked parameters: the global layers that their rows belong to}."""
    return {
        name: tuple(segment.indices(member))
        for segment in layout
        for member, name in enumerate(segment.names)
    }


def rows_elsewhere(
    ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[str, int]]]:
    """{name in `ours`: (name, row) of each of its layers in `theirs`}, both as `stacked_layers`.

    Raises ValueError unless both have the same layers.
    """
    where = {layer: (name, row) for name, own in theirs.items() for row, layer in enumerate(own)}
    if sorted(where) != sorted(layer for own in ours.values() for layer in own):
        raise ValueError(f"{ours} and {theirs} are not of the same layers")
    return {name: [where[layer] for layer in own] for name, own in ours.items()}


def init(
    layout: Sequence[Segment], key: Array, x: jax.ShapeDtypeStruct, context: Context
) -> dict[str, dict[str, Any]]:
    """Stacked variables `{collection: {segment name: {...: [count, ...]}}}` for every layer.

    `x` `[B, S, D]` is abstract: the layers learn their shapes from it and compute nothing on it.
    """
    variables: dict[str, dict[str, Any]] = {}
    for segment in layout:
        for member, (name, layer) in enumerate(zip(segment.names, segment.layers, strict=True)):

            def init_layer(index: Array, layer: Layer = layer) -> Any:
                own = context.replace(layer_index=index, window=layer.window)
                # Lazy: what depends on x is not computed, and its kernels are not compiled.
                return layer.block.lazy_init(jax.random.fold_in(key, index), x, own)

            # A loop, not vmap: under some random generators vmap draws other numbers.
            stacked = jax.lax.map(init_layer, jnp.asarray(segment.indices(member)))
            stacked = nn.meta.add_axis(stacked, 0, {nn.meta.PARTITION_NAME: "layers"})
            for collection, tree in stacked.items():
                variables.setdefault(collection, {})[name] = tree
    return variables


def apply(
    layout: Sequence[Segment],
    variables: dict[str, dict[str, Any]],
    x: Array,
    context: Context,
    *,
    per_layer: dict[str, dict[str, Any]],
    remat: str,
    unroll: int,
) -> Passed:
    """Runs every segment.

    Args:
      layout: from `segments`.
      variables: from `init`; those of other names are ignored.
      x: embeddings `[B, S, D]`.
      context: of the whole model; each layer gets its own index, window, key, loads and carry.
      per_layer: fields of the context that each layer has its own of,
        `{field: {segment name: an array or a tree of arrays [count, ...]}}`.
      remat: a name in `REMAT_POLICIES`.
      unroll: units of layers per scan iteration.
    """
    total = reports.NOTHING
    stats: Stats = {}
    cache: dict[str, Any] = {}
    carry = (x, context.router_carry)
    for segment in layout:
        step = _segment_step(segment, context, remat)
        names = set(segment.names)
        scanned = {
            collection: {name: tree for name, tree in trees.items() if name in names}
            for collection, trees in variables.items()
        }
        fields = {
            name: {field: values[name] for field, values in per_layer.items() if name in values}
            for name in segment.names
        }
        indices = jnp.asarray([segment.indices(j) for j in range(len(segment.layers))]).T
        carry, (told, new_stats, new_cache) = jax.lax.scan(
            step, carry, (scanned, fields, indices), unroll=min(unroll, segment.count)
        )
        total = total + _over_layers(segment, told)
        stats |= new_stats
        cache |= new_cache
    return Passed(
        x=carry[0],
        terms=total.terms,
        measures=total.measures,
        stats=stats,
        log_prob=total.log_prob,
        cache=cache,
    )


def _over_layers(segment: Segment, told: Sequence[Report]) -> Report:
    """The sum of what the members of a segment told; measures by layer, each of theirs."""
    total = reports.NOTHING
    for member, report in enumerate(told):
        by_layer = {
            f"{name}/{layer}": jax.tree.map(lambda x, row=row: x[row], term)
            for name, term in report.measures.items()
            for row, layer in enumerate(segment.indices(member))
        }
        summed = jax.tree.map(lambda x: x.sum(axis=0), report)
        total = total + dataclasses.replace(summed, measures=by_layer)
    return total


def _run(block: nn.Module, variables: Any, x: Array, context: Context) -> Any:
    changing = [REPORTS, "cache"] if context.decode else [REPORTS]
    (x, terms, stats, carry), changed = block.apply(variables, x, context, mutable=changing)
    told = reports.told(changed)
    told = dataclasses.replace(told, terms=add_terms(told.terms, terms))
    return x, carry, told, stats, changed.get("cache")


def _rematerialised(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[remat])


def _segment_step(segment: Segment, context: Context, remat: str) -> Callable[..., Any]:
    """The scan body: the layers of one unit, one after another."""

    def step(carry: Any, inputs: Any) -> Any:
        x, router_carry = carry
        scanned, fields, indices = inputs
        told: list[Report] = []
        stats: Stats = {}
        cache: dict[str, Any] = {}
        for member, (name, layer) in enumerate(zip(segment.names, segment.layers, strict=True)):
            index = indices[member]
            own = context.replace(
                layer_index=index,
                window=layer.window,
                key=None if context.key is None else fold_in(context.key, index),
                router_carry=router_carry,
                **fields[name],
            )
            variables = {c: trees[name] for c, trees in scanned.items() if name in trees}
            run_layer = _rematerialised(functools.partial(_run, layer.block), remat)
            x, router_carry, report, new_stats, new_cache = run_layer(variables, x, own)
            told.append(report)
            if new_stats:
                stats[name] = new_stats
            if new_cache is not None:
                cache[name] = new_cache
        return (x, router_carry), (told, stats, cache)

    return step
