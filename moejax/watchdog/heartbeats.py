"""Where every process of a run is, as files in its folder; from them, which one is behind.

All processes of a run go through the same phases in the same order and count them. The one that
has counted least is where the others wait for it: no clock is read, let alone two compared.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

Beat = Mapping[str, Any]  # process, num_processes, host, session, phase, step, count

_MOST_NAMED = 8


def write(folder: str | os.PathLike[str], beat: Beat) -> None:
    """Writes one process's place, in one move. Raises OSError."""
    path = _path(folder, beat["process"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(beat)), encoding="utf-8")
    os.replace(partial, path)


def read(folder: str | os.PathLike[str], session: str, num_processes: int) -> list[Beat | None]:
    """The place of every process; None for one that has not been heard of in this session."""
    beats: list[Beat | None] = []
    for process in range(num_processes):
        try:
            beat = json.loads(_path(folder, process).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            beat = None
        ours = isinstance(beat, dict) and beat.get("session") == session
        beats.append(beat if ours else None)
    return beats


def who_is_behind(beats: Sequence[Beat | None]) -> str:
    """One sentence: which processes the others wait for, in which phase, since which step."""
    unheard = [f"process {number}" for number, beat in enumerate(beats) if beat is None]
    if unheard:
        return f"{_some(unheard)} of {len(beats)} not heard of in this session"
    counts = [beat["count"] for beat in beats]
    last = [beat for beat in beats if beat["count"] == min(counts)]
    if len(last) == len(beats):
        alone = "" if len(beats) > 1 else " (it is the only one)"
        return f"no process is behind another: all are {_place(last[0])}{alone}"
    first = max(beats, key=lambda beat: beat["count"])
    named = _some([f"process {b['process']} (on {b['host']}), {_place(b)}," for b in last])
    verb = "is" if len(last) == 1 else "are"
    return f"{named} {verb} behind; the first is {_place(first)}"


def _place(beat: Beat) -> str:
    return f"in phase {beat['phase']!r} of step {beat['step']}"


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return " ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _path(folder: str | os.PathLike[str], process: int) -> pathlib.Path:
    return pathlib.Path(folder) / f"process-{process}.json"
