"""Runs a command as a child, hears which phase it is in, and ends it where that takes too long.

On expiry every thread's stack is printed (by the child, on SIGUSR1), the process that the others
wait for is named, the child is killed and the status is `EXPIRED`, so that a scheduler restarts.
Signals are passed on. Parent and child end together, whichever is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from moejax.watchdog import heartbeats
from moejax.watchdog.deadlines import OFF, ON, parse
from moejax.watchdog.tied import die_with

SETTING = "MOEJAX_WATCHDOG"  # on, off, or deadlines
PIPE = "MOEJAX_WATCHDOG_PIPE"  # the file descriptor on which the child tells its phases
STOPPED = "MOEJAX_STOPPED_STATUS"  # exit status after a SIGTERM, where 0 would mean "finished"
EXPIRED = 75  # "try again" in sysexits.h

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TICK = 0.2  # seconds after which the end of the child is noticed
_ASKING_SECONDS = 30.0  # for the places of thousands of processes, from a slow file system


def wanted(environment: Mapping[str, str]) -> bool:
    """True where a watchdog is asked for and this process is not the one that is watched."""
    return environment.get(SETTING, OFF) not in ("", OFF) and PIPE not in environment


def watch(command: Sequence[str], *, grace: float = 5.0, heartbeat_every: float = 5.0) -> int:
    """Runs `command` under the deadlines of the environment; its exit status, or `EXPIRED`.

    `grace` is how many seconds the child has to print its stacks, and to be gone once killed;
    `heartbeat_every` how often its place is written where the other processes see it.
    """
    deadlines = parse(os.environ.get(SETTING, ON))
    return _Watchdog(deadlines, grace=grace, heartbeat_every=heartbeat_every).run(command)


class _Watchdog:
    def __init__(self, deadlines: Mapping[str, float], *, grace: float, heartbeat_every: float):
        self._deadlines, self._grace, self._every = deadlines, grace, heartbeat_every
        self._beat: dict[str, Any] = {"phase": "start", "step": 0, "count": 0}
        self._child: subprocess.Popen | None = None
        self._received: list[int] = []  # signals
        self._tail = b""
        self._due = time.monotonic() + deadlines["start"]

    def run(self, command: Sequence[str]) -> int:
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        told, telling = os.pipe()
        self._child = child = subprocess.Popen(
            command,
            pass_fds=[telling],
            env=os.environ | {PIPE: str(telling)},
            process_group=0,  # a terminal's Ctrl-C comes once, from here
            preexec_fn=die_with(os.getpid()),
        )
        os.close(telling)
        for number in self._received[:]:  # while the child was made
            child.send_signal(number)
        threading.Thread(target=self._write_heartbeats, daemon=True).start()
        sources = [told]
        while child.poll() is None:
            if select.select(sources, [], [], _TICK)[0]:
                text = os.read(told, 1 << 16)
                self._hear(text)
                sources = sources if text else []  # closed: the child is about to end
                time.sleep(0 if text else _TICK)
            if time.monotonic() > self._due:
                return self._expire(child)
        return self._status(child.returncode)

    def _status(self, returned: int) -> int:
        status = returned if returned >= 0 else 128 - returned
        stopped = os.environ.get(STOPPED)
        if stopped and signal.SIGTERM in self._received and status in (0, 128 + signal.SIGTERM):
            return int(stopped)
        return status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)

    def _hear(self, text: bytes) -> None:
        *lines, self._tail = (self._tail + text).split(b"\n")
        for line in lines:
            self._beat = self._beat | json.loads(line)
            self._due = time.monotonic() + self._deadlines[self._beat["phase"]]

    def _write_heartbeats(self) -> None:
        """In a thread: a shared file system that hangs must not stop the watchdog."""
        written = None
        while True:
            time.sleep(self._every)
            beat = self._beat
            if beat != written and "folder" in beat:
                with contextlib.suppress(OSError):  # the next one may get through
                    heartbeats.write(beat["folder"], beat)
                    written = beat

    def _expire(self, child: subprocess.Popen) -> int:
        phase, step, who = self._beat["phase"], self._beat["step"], self._beat.get("process", 0)
        _say(
            f"process {who} has been in phase {phase!r} of step {step} for "
            f"{self._deadlines[phase]:g} s without news; the stacks of its threads:"
        )
        child.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(self._grace)
        if "folder" in self._beat:
            asking = threading.Thread(target=self._name_who_is_behind, daemon=True)
            asking.start()
            asking.join(_ASKING_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(self._grace)  # one that waits for a disk cannot even be killed
        _say(f"killed it; status {EXPIRED}")
        return EXPIRED

    def _name_who_is_behind(self) -> None:
        beat = self._beat
        with contextlib.suppress(OSError):
            heartbeats.write(beat["folder"], beat)
        beats = heartbeats.read(beat["folder"], beat["session"], beat["num_processes"])
        _say(heartbeats.who_is_behind(beats))


def _say(text: str) -> None:
    print(f"watchdog: {text}", file=sys.stderr, flush=True)
