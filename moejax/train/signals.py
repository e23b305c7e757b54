"""SIGTERM and Ctrl-C end a run at the next step boundary, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """While active, the first SIGINT or SIGTERM is remembered in `received` by its name.

    A second SIGINT interrupts at once, for a run that does not come to its next step.
    Outside the main thread Python cannot install handlers; then nothing is caught.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            pass
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
