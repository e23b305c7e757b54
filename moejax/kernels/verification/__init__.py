"""Runs the conformance kits on the device at hand, times what passed, and names the fastest.

A kernel is a module of this package with

    NAME, DTYPES, PRODUCTS, IMPLEMENTATIONS, and ROUNDS of timing
    obstacle(name, dtype)                 why an implementation cannot run here, or None
    is_dense(name)                        whether it computes densely here, and so is never chosen
    checks(name, dtype)                   calls that give what is wrong, in words
    sizes(), workloads()                  what is timed: in words, and as values
    call(name, product, dtype, workload)  a compiled function without arguments

Adding one is a file and its name in `KERNELS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType

import jax
import numpy as np

from moejax.kernels.verification import (
    block_attention,
    full_attention,
    grouped_matmul,
    least_loaded,
)

KERNELS = (block_attention, full_attention, grouped_matmul, least_loaded)


@dataclasses.dataclass
class Result:
    """What one implementation did on operands of one dtype.

    Attributes:
      obstacle: why it cannot run here; then nothing else is known.
      num_checks: how many checks ran.
      failures: what was wrong, in words.
      is_dense: it computes densely here (every group for every row, say) and is never chosen.
      seconds: product -> seconds per call, summed over the workloads.
    """

    implementation: str
    dtype: str
    obstacle: str | None = None
    num_checks: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    is_dense: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def may_be_chosen(self) -> bool:
        return self.obstacle is None and not self.failures and not self.is_dense


def verify(kernel: ModuleType, name: str, dtype: str) -> Result:
    """Every check of the kernel's kits on one implementation; an exception in one is a failure."""
    result = Result(name, dtype, kernel.obstacle(name, dtype))
    result.is_dense = kernel.is_dense(name)
    if result.obstacle is None:
        for check in kernel.checks(name, dtype):
            result.num_checks += 1
            with _exceptions_as_failures(result):  # a kernel that does not compile here, say
                result.failures += map(str, check())
    return result


def time_products(kernel: ModuleType, results: Iterable[Result]) -> None:
    """Fills in `seconds` of those that may be chosen, all of one dtype, in alternation.

    What is timed is larger than what is checked: an exception is a failure here too.
    """
    results = list(results)
    for workload, product in itertools.product(kernel.workloads(), kernel.PRODUCTS):
        calls: dict[str, Callable] = {}
        candidates = {r.implementation: r for r in results if r.may_be_chosen}
        for name, result in candidates.items():
            with _exceptions_as_failures(result, f"{product} of {kernel.sizes()}: "):
                call = kernel.call(name, product, result.dtype, workload)
                jax.block_until_ready(call())
                calls[name] = call
        for name, median in _medians(calls, kernel.ROUNDS).items():
            seconds = candidates[name].seconds
            seconds[product] = seconds.get(product, 0.0) + median
    for result in results:
        if result.failures:
            result.seconds.clear()


def fastest(results: Iterable[Result]) -> dict[str, str]:
    """Product -> the fastest implementation that may be chosen; empty if there is none."""
    timed = [r for r in results if r.may_be_chosen and r.seconds]
    return {
        product: min(timed, key=lambda r: r.seconds[product]).implementation
        for product in (timed[0].seconds if timed else ())
    }


@contextlib.contextmanager
def _exceptions_as_failures(result: Result, doing: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = str(error).partition("\n")[0][:200]
        result.failures.append(f"{doing}{type(error).__name__}: {what}")


def _medians(calls: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all compiled; they alternate, so a slow moment hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}
