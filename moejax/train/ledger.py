"""Keeps a run's account of its time (`analysis/goodput.py`) in its folder, session by session."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib

from moejax.analysis.goodput import GOODPUT, Session, read_sessions
from moejax.errors import UserError
from moejax.train import phases, processes

_log = logging.getLogger(__name__)


class Ledger:
    """The account of this session, after those before it. The first process writes it.

    A file that cannot be read or written is a warning: no run ends for its account. `start` steps
    are done.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        self._path = workdir / GOODPUT
        self._earlier: list[Session] = []
        self._session = Session(start=start, last=start, seconds={})
        if not processes.is_first():
            return
        try:
            self._earlier = read_sessions(workdir)
        except UserError as error:
            _log.warning("the account of earlier sessions is lost: %s", error)
        before = self._written_at()
        self.update(start)
        after = self._written_at()
        if self._earlier and before is not None and after is not None:
            down = after - before - sum(self._session.seconds.values())
            self._session = dataclasses.replace(self._session, down=max(down, 0.0))

    def update(self, step: int, *, ended: str = "") -> None:
        """`step` steps are done; `ended` says why, where there will be no more in this session."""
        if not processes.is_first():
            return
        seconds = phases.current().seconds()
        changed = {"last": step, "seconds": seconds, "ended": ended}
        self._session = dataclasses.replace(self._session, **changed)
        sessions = [dataclasses.asdict(s) for s in (*self._earlier, self._session)]
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps({"sessions": sessions}, indent=1), encoding="utf-8")
            os.replace(partial, self._path)
        except OSError as error:
            _log.warning("the account of the run's time cannot be written: %s", error)

    def _written_at(self) -> float | None:
        """By the clock of the file system."""
        try:
            return self._path.stat().st_mtime
        except OSError:
            return None
