"""Where the time of a run went, over all of its sessions: productive, overhead, lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

from moejax.errors import UserError

GOODPUT = "goodput.json"

_PRODUCTIVE = ("first step", "step")
_OVERHEADS = {
    "compile": ("compile",),
    "restore": ("restore",),
    "data": ("prepare", "data"),
    "save": ("save",),
    "evaluate": ("evaluate",),
    "other": ("start", "exit"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """One process's life, as the run's folder remembers it.

    Attributes:
      start: steps that were done when it began.
      last: steps that were done when it last wrote.
      seconds: in each phase (`train/phases.py`), up to then.
      down: seconds between what the session before last wrote and this one's beginning. Both are
        times of the folder's file system: no clocks of two hosts are compared.
      ended: what ended it in good order ("finished", a signal's name, "--until 5"), else "".
    """

    start: int
    last: int
    seconds: dict[str, float]
    down: float = 0.0
    ended: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goodput:
    """Seconds of a run by what they were spent on; they add up to `total`.

    `lost` was spent on steps that a later session did again; each step of a session counts alike.
    `down` is the time between sessions, except after `--until` or a finished run. Steps that a
    killed session took after it last wrote are part of it: nobody knows how long they took.
    """

    productive: float
    lost: float
    down: float
    overheads: dict[str, float]
    num_sessions: int

    @property
    def total(self) -> float:
        """Seconds from the first session's beginning to the last one's end."""
        return self.productive + self.lost + self.down + sum(self.overheads.values())

    def figures(self) -> dict[str, str]:
        """Label to value, for the report and the line; what took no time is left out."""
        rows = {"productive": self.productive, **self.overheads}
        rows |= {"lost": self.lost, "down": self.down}
        return {name: duration(seconds) for name, seconds in rows.items() if seconds >= 0.05}

    def line(self) -> str:
        """One line for the end of a run."""
        share = self.productive / self.total if self.total else 0.0
        sessions = "1 session" if self.num_sessions == 1 else f"{self.num_sessions} sessions"
        parts = ", ".join(f"{name} {value}" for name, value in self.figures().items())
        return f"goodput {share:.1%} of {duration(self.total)} in {sessions}: {parts}"


def goodput(sessions: list[Session]) -> Goodput:
    """Adds up the sessions of a run, oldest first."""
    productive = lost = down = 0.0
    overheads = dict.fromkeys(_OVERHEADS, 0.0)
    for number, session in enumerate(sessions):
        resumed_at = min((s.start for s in sessions[number + 1 :]), default=session.last)
        steps = max(session.last - session.start, 0)
        kept = min(max(resumed_at - session.start, 0), steps)
        worked = sum(session.seconds.get(name, 0.0) for name in _PRODUCTIVE)
        useful = worked * kept / steps if steps else 0.0
        productive, lost = productive + useful, lost + worked - useful
        for name, phases in _OVERHEADS.items():
            overheads[name] += sum(session.seconds.get(phase, 0.0) for phase in phases)
        paused = number and sessions[number - 1].ended.startswith(("finished", "--until"))
        down += 0.0 if paused else session.down
    return Goodput(
        productive=productive,
        lost=lost,
        down=down,
        overheads=overheads,
        num_sessions=len(sessions),
    )


def read_sessions(run_dir: str | os.PathLike[str]) -> list[Session]:
    """The sessions of a run; none where its folder holds no account of them.

    Raises UserError where the file is not one.
    """
    path = pathlib.Path(run_dir) / GOODPUT
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
        return [Session(**session) for session in stored["sessions"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it to begin anew") from error


def duration(seconds: float) -> str:
    """In the two largest units: "3 h 12 min", "4 min 5 s", "7.3 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
