"""The records of a run as arrays: what the pictures and the report are drawn from.

A run that was resumed or rolled back has gone over some steps twice. The later pass is the one
that led to the final weights, so it replaces what the abandoned pass wrote for those steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOAD = "router/load"
_WARNINGS = ("warning", "rollback")  # events with a text for the reader
_PER_LAYER = ("router/entropy", "router/max_vio", "router/dead", "router/dropped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunWarning:
    """A warning or a rollback that the run wrote, and the step it belongs to."""

    step: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """N train records and M eval records of one run. What a record lacks is NaN.

    `scalars[name]` is `[N]`, `evals[name]` `[M]`, `layers[name]` `[N, L]` and `load`
    `[N, L, E]` (share of choices), with L the MoE layers: 0 for a dense model.
    """

    run: dict[str, Any]
    steps: NDArray[np.int64]
    scalars: dict[str, NDArray]
    layers: dict[str, NDArray]
    load: NDArray[np.float32]
    eval_steps: NDArray[np.int64]
    evals: dict[str, NDArray]
    warnings: tuple[RunWarning, ...]
    finished: dict[str, Any] | None
    num_resumes: int
    num_rollbacks: int
    started: float | None  # unix seconds
    wall_seconds: float

    def scalar(self, name: str) -> NDArray:
        """A train series by name, all NaN where the run has none."""
        return self.scalars.get(name, np.full(len(self.steps), np.nan))

    def evaluation(self, name: str) -> NDArray:
        """An eval series by name, all NaN where the run has none."""
        return self.evals.get(name, np.full(len(self.eval_steps), np.nan))

    @property
    def moe_layers(self) -> list[int]:
        """Global indices of the MoE layers, one per row of `load`."""
        named = self.run.get("moe_layers") or []
        count = self.load.shape[1]
        return list(named) if len(named) == count else list(range(count))


def build_history(records: Iterable[dict[str, Any]]) -> History:
    """Sorts the records of `read_metrics` or `iter_metrics` into a `History`."""
    run: dict[str, Any] = {}
    train: list[dict[str, Any]] = []
    evals: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    clock = _Clock()
    for record in records:
        kind = record["kind"]
        clock.add(record)
        if kind == "run":
            run = record["values"]
        elif kind == "train":
            if train and train[-1]["step"] >= record["step"]:
                _abandon(train, record["step"])
                _abandon(evals, record["step"])
            train.append(_compact(record))
        elif kind == "eval":
            _abandon(evals, record["step"])
            evals.append(record)
        elif kind == "event":
            events.append(record)
    names = [event["values"].get("event") for event in events]
    finished = [e["values"] for e in events if e["values"].get("event") == "finished"]
    return History(
        run=run,
        steps=_steps(train),
        scalars=_scalars(train),
        layers={name: _stack(train, name, 1) for name in _PER_LAYER},
        load=_stack(train, _LOAD, 2),
        eval_steps=_steps(evals),
        evals=_scalars(evals),
        warnings=tuple(
            _warning(event) for event, name in zip(events, names, strict=True) if name in _WARNINGS
        ),
        finished=finished[-1] if finished else None,
        num_resumes=names.count("resumed"),
        num_rollbacks=names.count("rollback"),
        started=clock.first,
        wall_seconds=clock.seconds,
    )


class _Clock:
    """Adds up the time between records, without the pauses between a stop and a resume."""

    def __init__(self):
        self.seconds = 0.0
        self.first = self._last = None

    def add(self, record: dict[str, Any]) -> None:
        now = record.get("time")
        if not isinstance(now, int | float):
            return
        self.first = now if self.first is None else self.first
        starts = record["kind"] == "run" or record["values"].get("event") == "resumed"
        if self._last is not None and not starts:
            self.seconds += max(0.0, now - self._last)
        self._last = now


def _abandon(records: list[dict[str, Any]], step: int) -> None:
    """Removes what an earlier pass wrote at `step` and after it."""
    while records and records[-1]["step"] >= step:
        records.pop()


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """Lists as float32 arrays: an eighth of the memory, which long runs of wide models need."""
    values = {
        name: np.asarray(value, np.float32) if isinstance(value, list) else value
        for name, value in record["values"].items()
    }
    return {"step": record["step"], "values": values}


def _steps(records: list[dict[str, Any]]) -> NDArray[np.int64]:
    return np.array([record["step"] for record in records], np.int64)


def _scalars(records: list[dict[str, Any]]) -> dict[str, NDArray]:
    rows = [record["values"] for record in records]
    names = {name: None for row in rows for name, value in row.items() if np.isscalar(value)}
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _stack(records: list[dict[str, Any]], name: str, ndim: int) -> NDArray[np.float32]:
    """The named arrays on top of each other; a record without one, or of another shape, is NaN."""
    rows = [record["values"].get(name) for record in records]
    shapes = [row.shape for row in rows if isinstance(row, np.ndarray) and row.ndim == ndim]
    shape = shapes[-1] if shapes else (0,) * ndim
    gap = np.full(shape, np.nan, np.float32)
    fits = [row if isinstance(row, np.ndarray) and row.shape == shape else gap for row in rows]
    return np.stack(fits) if fits else np.zeros((0, *shape), np.float32)


def _warning(event: dict[str, Any]) -> RunWarning:
    return RunWarning(step=event["step"], text=str(event["values"].get("text", "rollback")))
