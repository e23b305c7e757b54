"""The definition of the least-loaded plan: the paper's sequential algorithm, in numpy.

Algorithms 2 and 3 of Nguyen et al., arXiv 2601.17111, with the capacity as an integer. Of the
helpers that Algorithm 3 scans in order of load, only the first can ever take a chunk: it has the
most room, so if its chunk is too small, every other is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def least_loaded_plan(
    loads: np.ndarray | Sequence[int], num_devices: int, *, capacity: int, min_chunk: int
) -> np.ndarray:
    """The plan, int32 `[E, P]`; arguments as of the public `least_loaded_plan`, as plain values."""
    loads = np.asarray(loads, np.int64)
    per_device = len(loads) // num_devices
    assigned = np.zeros(num_devices, np.int64)
    pending = loads.reshape(num_devices, per_device).sum(1)  # native rows not looked at yet
    plan = np.zeros((len(loads), num_devices), np.int32)
    for expert in np.argsort(-loads, kind="stable").tolist():
        home, load = expert // per_device, int(loads[expert])
        pending[home] -= load
        room = int(capacity - assigned[home] - pending[home])
        kept = load if num_devices == 1 else min(max(room, 0), load)
        assigned[home] += kept
        plan[expert, home] += kept
        rest = load - kept
        while rest > 0:
            helper = _least_loaded(assigned + pending, home)
            chunk = min(rest, int(capacity - assigned[helper] - pending[helper]))
            if chunk < max(min_chunk, 1) and chunk < rest:
                chunk = rest  # nothing useful fits anywhere
            assigned[helper] += chunk
            plan[expert, helper] += chunk
            rest -= chunk
    return plan


def _least_loaded(held: np.ndarray, home: int) -> int:
    """The device other than `home` that holds least; of equal ones the lowest id."""
    others = [device for device in range(len(held)) if device != home]
    return min(others, key=lambda device: held[device])
