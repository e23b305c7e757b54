"""Ties a child to its parent: where the parent is killed, the kernel kills the child (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Callable[[], None] | None:
    """What a child runs before its command, so that it is killed when its parent is (Linux)."""
    if not sys.platform.startswith("linux"):
        return None  # it ends when it next tells a phase, for want of a reader
    libc = ctypes.CDLL(None)  # before the fork, where loading is safe

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return tie
