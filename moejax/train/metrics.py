"""Turns a step's sums into the values that are written: means, norms, rates, router statistics.

Sums are added over the steps between two records and divided once, so a record does not depend on
microbatches, remat or mesh, and padding counts nowhere.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from moejax.analysis import routing
from moejax.models.flops import Size
from moejax.models.transformer import Transformer

Values = dict[str, Any]


class Accumulator:
    """Adds up the metrics of several steps and describes them.

    `peak_flops` is the device's matmul peak in FLOP/s, or None where it is not known.
    """

    def __init__(
        self,
        model: Transformer,
        size: Size,
        *,
        weights: dict[str, float],
        tokens_per_step: int,
        peak_flops: float | None,
    ):
        self._model, self._size, self._weights = model, size, weights
        self._tokens_per_step, self._peak = tokens_per_step, peak_flops
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._num_steps = 0
        self._start = time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> None:
        """`metrics` of one step, already on the host."""
        sums = {name: metrics[name] for name in ("terms", "measures", "stats")}
        self._sums = _add(self._sums, sums) if self._sums else sums
        self._last = metrics
        self._num_steps += 1

    @property
    def tokens_per_second(self) -> float:
        """Since the last record."""
        seconds = time.perf_counter() - self._start
        return self._num_steps * self._tokens_per_step / seconds

    def take(self) -> Values:
        """The values of the steps added since the last call, and starts over."""
        rate = self.tokens_per_second
        values = means(self._sums["terms"], prefix="loss/") | means(self._sums["measures"])
        # To the loss of its step a term without a count adds nothing (see `step.py`).
        counted = [name for name in self._weights if self._sums["terms"][name][1]]
        weighted = [self._weights[name] * values[f"loss/{name}"] for name in counted]
        values["loss"] = sum(weighted) if weighted else math.nan
        for name in ("grad_norm", "update_norm"):
            values[name] = float(self._last[name])
        values["skipped"] = int(self._last["skipped"])
        flops = rate * self._size.train_flops_per_token
        values["tokens_per_second"] = rate
        values["model_flops_per_second"] = flops
        values["peak_share"] = flops / self._peak if self._peak else None
        values |= router_values(self._model, self._sums["stats"])
        self._reset()
        return values


def means(terms: dict[str, tuple[Any, Any]], *, prefix: str = "") -> Values:
    """{prefix + name: sum / count}; NaN where nothing was counted."""
    return {
        prefix + name: float(total) / float(count) if count else math.nan
        for name, (total, count) in terms.items()
    }


def router_values(model: Transformer, stats: dict[str, Any]) -> Values:
    """Per MoE layer, in layer order: load `[layers, E]`, entropy, MaxVio, dead, dropped.

    What each of them is, and is for a layer without tokens, `analysis.routing` says. Dead counts
    experts that received nothing at all between two records.
    """
    if not model.moe_layers:
        return {}
    rows = [
        {name: np.asarray(value)[row] for name, value in stats[segment].items()}
        for segment, row in model.moe_layers.values()
    ]
    column = lambda name: np.array([row[name] for row in rows])
    loads = column("load")
    entropy = routing.router_entropy(column("entropy"), column("tokens"), model.moe.num_experts)
    low, high = routing.load_percentiles(loads, (10, 90)).T
    return {
        "router/load": routing.load_share(loads).tolist(),
        "router/entropy": entropy.tolist(),
        "router/max_vio": routing.max_vio(loads).tolist(),
        "router/load_p10": low.tolist(),
        "router/load_p90": high.tolist(),
        "router/dead": routing.num_dead_experts(loads).tolist(),
        "router/dropped": column("dropped").astype(int).tolist(),
    }


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {name: _add(a[name], b[name]) for name in a}
    if isinstance(a, tuple):
        return tuple(_add(x, y) for x, y in zip(a, b, strict=True))
    # Sums of integers over many steps stay exact in 64 bits.
    wide = np.int64 if np.issubdtype(np.asarray(a).dtype, np.integer) else np.float64
    return np.asarray(a, wide) + np.asarray(b, wide)
