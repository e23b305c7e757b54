"""Whether the processes of a run were given the same things."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

from moejax.errors import UserError
from moejax.train import processes


def check_same(what: str, lines: str) -> None:
    """Raises UserError in every process where `lines` are not the same in all of them.

    Args:
      what: the thing in words, such as "the config".
      lines: one `path = value` per line. The error names the first process that differs, its host
        and the first paths.
    """
    mine = json.dumps([socket.gethostname(), lines])
    problem = processes.exchange(
        mine, lambda all_: _first_difference(what, [tuple(json.loads(t)) for t in all_])
    )
    if problem:
        raise UserError(problem)


def _first_difference(what: str, given: Sequence[tuple[str, str]], *, shown: int = 5) -> str:
    host, lines = given[0]
    for process, (other_host, other_lines) in enumerate(given):
        if other_lines == lines:
            continue
        a, b = _by_path(lines), _by_path(other_lines)
        paths = [path for path in dict.fromkeys([*a, *b]) if a.get(path) != b.get(path)]
        stated = [
            f"{path} is {a.get(path, '(none)')} in process 0 and {b.get(path, '(none)')} in "
            f"process {process}"
            for path in paths[:shown]
        ]
        more = f"; and {len(paths) - shown} more" if len(paths) > shown else ""
        return (
            f"process {process} (on {other_host}) and process 0 (on {host}) differ in {what}: "
            f"{'; '.join(stated)}{more}: start all processes with the same command, files and "
            "versions"
        )
    return ""


def _by_path(lines: str) -> dict[str, str]:
    parts = (line.partition(" = ") for line in lines.splitlines())
    return {path: value for path, _, value in parts}
