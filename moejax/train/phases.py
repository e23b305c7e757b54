"""Which phase a run is in: told to its watchdog, and added up for its goodput.

Every process of a run goes through the same phases in the same order, so that their count says
which one is behind (`watchdog/heartbeats.py`): enter none in the first process alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from moejax.watchdog.deadlines import DEADLINES
from moejax.watchdog.parent import PIPE

PHASES = tuple(DEADLINES)
STEPPING = ("data", "first step", "step")  # the phases of a loop that takes steps

HEARTBEATS = "heartbeats"


class Phases:
    """Where one process is, and how many seconds it has been in each phase.

    `tell` receives what has changed, as one line of JSON; `now` is a clock in seconds.
    """

    def __init__(
        self,
        tell: Callable[[str], None] = lambda line: None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._tell, self._now = tell, now
        self._phase, self._step, self._count = "start", 0, 0
        self._since = now()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._waited = 0.0

    def enter(self, phase: str, step: int | None = None) -> str:
        """From now on the process is in `phase`; returns the one that it was in. A phase that is
        entered again is news all the same: its deadline starts anew."""
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is no phase; there are {', '.join(PHASES)}")
        self._charge()
        before, self._phase = self._phase, phase
        self._step = self._step if step is None else step
        self._count += 1
        self._tell(json.dumps({"phase": phase, "step": self._step, "count": self._count}))
        return before

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Within it the process is in that phase; afterwards in the one that it was in before."""
        before = self.enter(name, step)
        try:
            yield
        finally:
            self.enter(before)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it the process waits for devices, its own or, through them, the others'."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    def announce(self, **facts: Any) -> None:
        """Tells the watchdog who this process is and where its heartbeats go."""
        self._tell(json.dumps(facts))

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase so far; inner phases are not part of outer ones."""
        self._charge()
        return dict(self._seconds)

    def own_work(self) -> float:
        """Seconds of taking steps in which this process did not wait for devices."""
        seconds = self.seconds()
        return sum(seconds[name] for name in STEPPING) - self._waited

    def _charge(self) -> None:
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._since = now


_current = Phases()


def begin() -> None:
    """Call it first thing in a process that trains: before slow imports and whatever can hang.

    From here on SIGUSR1 prints the stacks of all threads, also while the main one is stuck in C.
    """
    global _current
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no standard error, no stacks
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a profile may be asked for too early
    _current = Phases(_teller())


def announce(workdir: str | os.PathLike[str], *, session: str) -> None:
    """Has the watchdog write this process's place into `workdir`, under the name of a session that
    all processes share."""
    from moejax.train import processes  # imports JAX, which `begin` comes before

    _current.announce(
        folder=os.path.join(os.path.abspath(workdir), HEARTBEATS),
        session=session,
        process=processes.index(),
        num_processes=processes.num_processes(),
        host=socket.gethostname(),
    )


def enter(name: str, step: int | None = None) -> str:
    """See `Phases.enter`."""
    return _current.enter(name, step)


@contextlib.contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """See `Phases.phase`. It decorates functions too."""
    with _current.phase(name, step):
        yield


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """See `Phases.waiting`."""
    with _current.waiting():
        yield


def current() -> Phases:
    """The phases of this process since `begin`."""
    return _current


def _teller() -> Callable[[str], None]:
    """Writes lines into the watchdog's pipe where there is one."""
    number = os.environ.pop(PIPE, None)  # not for this process's own children
    if number is None:
        return lambda line: None
    pipe = int(number)
    os.set_inheritable(pipe, False)
    os.set_blocking(pipe, False)

    def tell(line: str) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the next line says more
            os.write(pipe, line.encode() + b"\n")

    return tell
