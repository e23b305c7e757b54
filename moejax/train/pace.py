"""How long each process works by itself at every step, and which one keeps the others waiting.

In a step that all devices take together everybody is as slow as the slowest, so step times tell
nothing. What a process does itself, outside waiting for devices, does: the straggler waits least.
Only durations are sent, never times, so clocks that disagree do not matter. A device that is slow
by itself does not show here.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
from typing import Any

from moejax.train import phases, processes

_LEAST_SECONDS = 0.005  # less is nothing to look for
_LEAST_SHARE = 0.05  # of a step's time
_REPEAT_EVERY = 100  # records after which the same process is named again


class Pace:
    """Every process calls `take` at each record; nobody waits for anybody.

    What the others have sent is read one record later, when it is there.
    """

    def __init__(self) -> None:
        self._records, self._step, self._own, self._steps_seconds = 0, None, 0.0, 0.0
        self._before = math.nan  # seconds of a step in the window that is read next
        self._mine = ""  # what this process has left of that window
        self._reported: tuple[int, float, int] | None = None
        self._warning: str | None = None

    def take(self, step: int) -> dict[str, Any]:
        """{"own_work_ms": [milliseconds per step of each process]} of the record before.

        Empty at the first two records, and in all processes but the first. NaN stands for a process
        that has not come as far. `step` is that of the record.
        """
        now = phases.current()
        own, seconds = now.own_work(), sum(now.seconds()[name] for name in phases.STEPPING)
        if self._step is None or step <= self._step:
            self._step, self._own, self._steps_seconds = step, own, seconds
            return {}  # steps from before are not known, or the first one, which is like no other
        count = step - self._step
        before, self._mine = (
            self._mine,
            json.dumps([socket.gethostname(), (own - self._own) / count]),
        )
        per_step = (seconds - self._steps_seconds) / count
        self._step, self._own, self._steps_seconds = step, own, seconds
        self._records += 1
        processes.publish(f"pace/{self._records}", self._mine)
        step_before, self._before = self._before, per_step
        if not processes.is_first() or self._records == 1:
            return {}
        found = processes.take_published(f"pace/{self._records - 1}") | {0: before}
        works = {process: tuple(json.loads(text)) for process, text in found.items()}
        self._warning = self._compare(works, step_before)
        all_ = range(processes.num_processes())
        return {"own_work_ms": [1e3 * works[p][1] if p in works else math.nan for p in all_]}

    def warnings(self) -> list[str]:
        """A line on the straggler, where the last `take` has found one that matters."""
        warning, self._warning = self._warning, None
        return [] if warning is None else [warning]

    def _compare(self, works: dict[int, tuple[str, float]], per_step: float) -> str | None:
        if len(works) < 2:
            return None
        median = statistics.median_low(seconds for _, seconds in works.values())
        process = max(works, key=lambda p: works[p][1])
        host, slowest = works[process]
        if slowest - median < max(_LEAST_SECONDS, _LEAST_SHARE * per_step):
            return None
        if self._reported is not None:
            known, reported, record = self._reported
            recent = self._records - record < _REPEAT_EVERY
            if known == process and slowest < 2 * reported and recent:
                return None
        self._reported = (process, slowest, self._records)
        return (
            f"slowest: process {process} (host {host}): {1e3 * slowest:.0f} ms of its own work per "
            f"step, median {1e3 * median:.0f} ms"
        )
