"""Agreement between the processes of one run; with one process these do nothing."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """True in the one process that lists, renames and deletes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here; `name` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(ok: bool) -> bool:
    """True where `ok` is True in every process."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def from_first(values: Sequence[int]) -> list[int]:
    """The first process's integers (each below 2**31), in every process."""
    if jax.process_count() == 1:
        return list(values)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
    mine = np.zeros(length, np.int32)
    mine[: min(length, len(values))] = np.asarray(list(values), np.int32)[:length]
    return [int(v) for v in multihost_utils.broadcast_one_to_all(mine)]
