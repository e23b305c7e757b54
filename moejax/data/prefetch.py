"""A background thread that computes the next batches while the device works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1


class Prefetch(Iterator[T], Generic[T]):
    """Iterates over `make(start), make(start + 1), ...`, computed ahead by one thread.

    An exception in `make` is raised by the `next` that would have returned its value, and ends
    the iteration. Use as a context manager, or call `close()`: it stops the thread and waits
    for it.
    """

    def __init__(
        self, make: Callable[[int], T], *, start: int, stop: int | None = None, depth: int = 2
    ):
        self._make, self._start, self._stop = make, start, stop
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="moejax-data", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        while not self._closed.is_set():
            try:
                value, error = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if error is not None:
                self.close()
                raise error
            return value
        raise StopIteration

    def close(self) -> None:
        """Stops the thread; may be called more than once."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self) -> None:
        step = self._start
        while not self._closed.is_set() and (self._stop is None or step < self._stop):
            try:
                item = (self._make(step), None)
            except BaseException as e:  # the consumer raises it
                item = (None, e)
            self._put(item)
            if item[1] is not None:
                return
            step += 1
        self._put((None, StopIteration()))

    def _put(self, item: tuple) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
        return None
