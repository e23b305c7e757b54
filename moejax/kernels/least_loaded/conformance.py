"""Does an implementation of the least-loaded plan agree with its definition, bit for bit, here?"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from moejax.kernels.least_loaded import least_loaded_plan, reference


class Case(NamedTuple):
    """Loads and limits of one plan. `num_devices` divides `len(loads)`."""

    name: str
    loads: tuple[int, ...]
    num_devices: int
    capacity: int
    min_chunk: int


def _zipf(num_experts: int, exponent: float, total: int, seed: int) -> tuple[int, ...]:
    share = np.arange(1, num_experts + 1) ** -exponent
    share = np.random.default_rng(seed).permutation(share / share.sum())
    return tuple(int(rows) for rows in share * total)


CASES = (
    Case("nothing to do", (0,) * 8, 4, 10, 1),
    Case("balanced", (5,) * 8, 4, 10, 1),
    Case("equal loads on one device", (6, 6, 6, 6, 0, 0, 0, 0), 2, 12, 1),
    Case("one expert has all, in chunks of min_chunk", (0, 0, 1000, *(0,) * 9), 4, 250, 250),
    Case("no chunk is large enough", (0, 0, 1000, *(0,) * 9), 4, 250, 251),
    # A helper is filled over its capacity and gives up rows of its own afterwards.
    Case("forced, then displaced", (90, 0, 80, 0, 30, 29, 0, 0), 4, 58, 200),
    Case("capacity below the mean", (70, 10, 40, 0, 0, 0), 3, 20, 8),
    Case("no least chunk, and no room", (70, 10, 40, 0, 0, 0), 3, 20, 0),
    Case("two devices", (70, 10, 40, 0), 2, 60, 8),
    Case("zipf", _zipf(32, 1.2, 100_000, 0), 8, 13_125, 1024),
    Case("zipf, large chunks", _zipf(32, 0.8, 10_000, 1), 8, 1_250, 1024),
    Case("more devices than a vector has lanes", _zipf(288, 1.0, 900_000, 2), 144, 6_562, 64),
)


def failures(implementation: str, cases: tuple[Case, ...] = CASES) -> Iterator[str]:
    """What differs from the reference on the device at hand, in words; nothing if all agree."""
    make = functools.partial(least_loaded_plan, implementation=implementation)
    compiled = jax.jit(make, static_argnums=1)
    for case in cases:
        limits = {"capacity": case.capacity, "min_chunk": case.min_chunk}
        loads = np.asarray(case.loads, np.int32)
        want = reference.least_loaded_plan(loads, case.num_devices, **limits)
        got = np.asarray(compiled(loads, case.num_devices, **limits))
        if (wrong := np.argwhere(got != want)).size:
            expert, device = wrong[0]
            yield (
                f"{case.name}: plan[{expert}, {device}] is {got[expert, device]}, and the "
                f"definition says {want[expert, device]}"
            )
