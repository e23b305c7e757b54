"""Profiles some steps of a run, when its command or a signal asks for it."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import signal
from typing import Any

import jax

from moejax.errors import UserError
from moejax.train import processes

PROFILE = "profile"  # folder in the workdir
STEPS_PER_SIGNAL = 3

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Window:
    """`count` steps beginning with the one that comes after `first` finished steps."""

    first: int
    count: int

    @staticmethod
    def parse(text: str) -> Window:
        """From "STEP:COUNT". Raises UserError where it is not that."""
        first, _, count = text.partition(":")
        if not (first.isdecimal() and count.isdecimal() and int(count) > 0):
            raise UserError(f"--profile {text} is not STEP:COUNT, such as 100:5 for five steps")
        return Window(int(first), int(count))


class Profiler:
    """Call `before_step` before each step. While active, SIGUSR2 profiles the next few steps.

    Each process writes into `folder`/process-N. A profile that fails ends no run: a warning says
    why there is none. Outside the main thread, where Python installs no handlers, signals do
    nothing.
    """

    def __init__(self, folder: pathlib.Path, window: Window | None = None):
        self._folder = folder / f"process-{processes.index()}"
        self._window, self._until = window, None
        self._asked, self._previous = False, None

    def before_step(self, step: int, state: Any) -> None:
        """`step` steps are done or on their way; `state` is what the last of them returns."""
        if self._asked and self._until is None:
            self._window, self._asked = Window(step, STEPS_PER_SIGNAL), False
        if self._until is not None and step >= self._until:
            self._stop(state)
        if self._window is not None and step >= self._window.first:
            count, self._window = self._window.count, None
            self._start(step, count)

    def _start(self, step: int, count: int) -> None:
        try:
            jax.profiler.start_trace(str(self._folder))
        except (RuntimeError, OSError, ValueError) as error:
            _log.warning("no profile of step %d: %s", step, error)
            return
        self._until = step + count

    def _stop(self, state: Any = None) -> None:
        jax.block_until_ready(state)  # the devices run behind: their last step belongs to it
        self._until = None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError, ValueError) as error:
            _log.warning("the profile was not written to %s: %s", self._folder, error)
            return
        _log.info("profile: %s (show it with TensorBoard's or xprof's --logdir)", self._folder)

    def __enter__(self) -> Profiler:
        try:
            self._previous = signal.signal(signal.SIGUSR2, self._ask)
        except ValueError:
            self._previous = None
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGUSR2, self._previous)
        if self._until is not None:
            self._stop()

    def _ask(self, *unused: Any) -> None:
        self._asked = True
