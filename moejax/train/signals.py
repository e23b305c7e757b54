"""SIGTERM and Ctrl-C, in any process, end a run at the same place in all of them."""

from __future__ import annotations

import signal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.train import processes
from moejax.train.stop_signal import StopSignal


class AgreedStop:
    """A stop signal that came to any process of the run, seen by all of them at the same step."""

    def __init__(self, signal_here: StopSignal, mesh: jax.sharding.Mesh):
        self._here, self._largest = signal_here, _Largest(mesh)

    def poll(self) -> str | None:
        """The signal's name, or None. Every process calls it once per step, after it has started
        the step, and once per batch of an evaluation."""
        here = self._here.received
        number = self._largest(0 if here is None else int(signal.Signals[here]))
        return signal.Signals(number).name if number else None

    def hold(self) -> None:
        """From here on a signal waits for a checkpoint: every process has compiled its step.

        Before that a process that was told to stop ends on its own, and all of them were told.
        """
        processes.barrier("the first step")
        self._here.hold()

    def release(self) -> None:
        """All is saved: a signal need not wait for what is left."""
        self._here.release()


class _Largest:
    """The largest of one number per process, one call late, so that nobody waits for a step.

    Every process calls it once per step, after it has started the step. The number of this call
    goes round in a program of its own behind that step (4 bytes per device), and what returns is
    the result of the call before, which is there when the metrics of its step are. So all
    processes see a number in the same step, at most two steps after it was given, and the devices
    never idle for it.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._max = jax.jit(lambda x: x.max(), out_shardings=whole)
        self._size, self._before = mesh.size, None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        mine = jax.make_array_from_callback(
            (self._size,), self._each, lambda part: np.full(1, number, np.int32)
        )
        before, self._before = self._before, self._max(mine)
        return 0 if before is None else int(before)
