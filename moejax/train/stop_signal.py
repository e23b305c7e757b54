"""SIGTERM and Ctrl-C, heard at any time, also while the main thread is inside a compiler.

Nothing here imports JAX: a command listens before it imports anything else.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

GRACE_SECONDS = 30.0  # what Kubernetes gives by default
_SHARE = 0.9  # of the grace period that a run takes for itself

_NOTHING_LOST = "nothing is lost, for no step of this session was finished"
_LATE = "no checkpoint within {:.0f} s: the newest one on storage is what is left"
_FINISHED = "training is finished and saved; only the last figures and the report are not"


class StopSignal:
    """While active, the first SIGINT or SIGTERM is remembered in `received` by its name.

    That is all, unless a command gives `leave`, which is called with what to tell the user and
    must end the process. It is called from another thread, at once between start and `hold` and
    after `release`, for then a restart loses nothing that matters; in between, a loop has time to
    save, and `leave` is called only where most of the `grace` seconds after a SIGTERM are over.
    A process that dies like this is one that was killed, which the checkpoints are made for.

    A second SIGINT interrupts at once, for a run that does not come to its next step. Outside
    the main thread Python cannot install handlers; then nothing is caught.
    """

    def __init__(
        self, *, leave: Callable[[str], object] | None = None, grace: float = GRACE_SECONDS
    ) -> None:
        self.received: str | None = None
        self._leave, self._patience = leave, _SHARE * grace
        self._previous: dict[int, object] = {}
        self._changed = threading.Condition()
        self._something_to_lose, self._ended = False, False
        self._without_loss = _NOTHING_LOST

    def __enter__(self) -> StopSignal:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            return self
        if self._leave is not None:
            source, self._sink = os.pipe()
            os.set_blocking(self._sink, False)
            # The interpreter writes there when a signal comes, whatever the main thread does.
            self._wakeup_before = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
            listener = threading.Thread(target=self._listen, args=(source,), daemon=True)
            listener.name = "moejax-signals"
            listener.start()
        return self

    def __exit__(self, *unused) -> None:
        if self._leave is not None and self._previous:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._sink)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def hold(self) -> None:
        """From here on a signal waits for the run to save."""
        self._something_to_lose = True

    def release(self) -> None:
        """All is saved: a signal, also one that came before, need not wait for what is left."""
        with self._changed:
            self._something_to_lose, self._without_loss = False, _FINISHED
            self._changed.notify_all()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def _listen(self, source: int) -> None:
        number = None
        while number not in (signal.SIGINT, signal.SIGTERM):
            content = os.read(source, 1)
            if not content:  # ended without a signal
                os.close(source)
                return
            number = content[0]
        name = signal.Signals(number).name
        limit = self._patience if number == signal.SIGTERM else float("inf")
        deadline = time.monotonic() + limit
        with self._changed:
            while not self._ended:
                if not self._something_to_lose:
                    self._leave(f"{name}: {self._without_loss}")
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    self._leave(f"{name}: {_LATE.format(limit)}")
                    return
                self._changed.wait(None if left == float("inf") else left)
