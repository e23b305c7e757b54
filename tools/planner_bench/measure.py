"""Runs planners on workloads: how full devices get, which weights move, how long a plan takes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from planner_bench import rivals
from planner_bench.workloads import Workload

from moejax.parallel import planners
from moejax.parallel.rebalance import ceil_of_mean, num_rows, rebalance

Plan = Callable[[Array], Array]  # loads [E] -> rows [E, P]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What planners are given, and how often they are timed.

    Attributes:
      min_chunk: rows; for small traces at most an eighth of those of a device.
      spare_slots: of EPLB, per device.
      decay: of the moving average, per step.
      calls: that are timed.
    """

    min_chunk: int
    spare_slots: int
    decay: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Result:
    """One planner on one workload, without the steps that only make history.

    Attributes:
      before, after: largest over mean load of the devices, averaged over steps and layers.
      worst: the largest of `after`.
      most_foreign: experts on one device that it does not own, the largest number.
      copies: pairs of an expert and a device that does not own it, averaged.
      microseconds: of one plan, the median; of EPLB's placement on the host.
    """

    group: str
    workload: str
    num_experts: int
    num_devices: int
    planner: str
    before: float
    after: float
    worst: float
    most_foreign: int
    copies: float
    microseconds: float


@functools.cache  # compiled once for all workloads of a size
def compiled_planners(devices: int, rows_per_device: int, min_chunk: int) -> dict[str, Plan]:
    """Name -> a compiled planner."""

    def with_capacity(planner, alpha: float) -> Plan:
        def plan(loads: Array) -> Array:
            return planner(loads, devices, ceil_of_mean(loads.sum(), devices, alpha))

        return jax.jit(plan)

    least_loaded = functools.partial(planners.least_loaded, min_chunk=min_chunk)
    rows = num_rows(rows_per_device, devices, min_chunk=min_chunk)
    limits = {"min_chunk": min_chunk, "num_rows": rows, "num_slots": 4}
    return {
        "native": with_capacity(planners.native, 1),
        "least 1": with_capacity(least_loaded, 1),
        "least 1.05": with_capacity(least_loaded, 1.05),
        "least 1.25": with_capacity(least_loaded, 1.25),
        "one owner": with_capacity(planners.one_owner, 1),
        "wrap": with_capacity(rivals.wrap_around, 1),
        "rebalance": jax.jit(lambda loads: rebalance(loads, devices, **limits).rows),
    }


def measure(workload: Workload, settings: Settings) -> list[Result]:
    """Every planner on the workload."""
    results = []
    rows_per_device = -(-int(workload.loads.sum(2).max()) // workload.num_devices)
    min_chunk = max(1, min(settings.min_chunk, rows_per_device // 8))
    planners_by_name = compiled_planners(workload.num_devices, rows_per_device, min_chunk)
    for name, plan in planners_by_name.items():
        run = lambda loads, plan=plan: np.asarray(plan(jnp.asarray(loads, jnp.int32)))
        rows = np.asarray([[run(loads) for loads in layers] for layers in workload.loads])
        seconds = _seconds(plan, workload, settings.calls)
        results.append(_result(name, workload, rows, seconds))
    for name, believed in _beliefs(workload.loads, settings.decay).items():
        rows, seconds = _eplb(workload, believed, settings.spare_slots)
        results.append(_result(name, workload, rows, seconds))
    return results


def _seconds(plan: Plan, workload: Workload, calls: int) -> float:
    """The median of so many calls, over different loads of the workload, on the device already."""
    loads = workload.loads.reshape(-1, workload.loads.shape[2])
    inputs = [jnp.asarray(x, jnp.int32) for x in loads[-8:]]
    seconds = []  # compiled before, when the plans were made
    for i in range(calls):
        start = time.perf_counter()
        plan(inputs[i % len(inputs)]).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _beliefs(loads: np.ndarray, decay: float) -> dict[str, np.ndarray]:
    """What EPLB knows of the loads before each step, `[steps, layers, E]` each."""
    average = loads.astype(float)
    for step in range(1, len(loads)):
        average[step] = decay * average[step - 1] + (1 - decay) * loads[step - 1]
    old = np.concatenate([loads[:1], loads[:-1]])
    return {"EPLB oracle": loads, "EPLB old": old, "EPLB average": average}


def _eplb(workload: Workload, believed: np.ndarray, spare: int) -> tuple[np.ndarray, float]:
    plans, seconds = np.empty((*workload.loads.shape, workload.num_devices), np.int64), []
    for at in np.ndindex(workload.loads.shape[:2]):
        start = time.perf_counter()
        replicas = rivals.replicated(believed[at], workload.num_devices, spare)
        seconds.append(time.perf_counter() - start)
        plans[at] = rivals.split_evenly(workload.loads[at], replicas)
    return plans, float(np.median(seconds))


def _result(name: str, workload: Workload, rows: np.ndarray, seconds: float) -> Result:
    """`rows`: the plans `[steps, layers, E, P]`. Raises AssertionError if one loses a row."""
    assert (rows.sum(3) == workload.loads).all(), name
    rows = rows[min(workload.history, len(rows) - 1) :]
    num_experts, num_devices = rows.shape[2:]
    load = rows.sum(2, dtype=np.int64)  # [steps, layers, P]
    owner = np.asarray(planners.is_owner(num_experts, num_devices))
    native = np.where(owner, rows.sum(3, keepdims=True, dtype=np.int64), 0).sum(2)
    mean = np.maximum(load.mean(2), 1)
    foreign = (rows > 0) & ~owner
    return Result(
        group=workload.group,
        workload=workload.name,
        num_experts=num_experts,
        num_devices=num_devices,
        planner=name,
        before=float((native.max(2) / mean).mean()),
        after=float((load.max(2) / mean).mean()),
        worst=float((load.max(2) / mean).max()),
        most_foreign=int(foreign.sum(2).max()),
        copies=float(foreign.sum((2, 3)).mean()),
        microseconds=1e6 * seconds,
    )
