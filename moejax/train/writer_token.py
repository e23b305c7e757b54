"""Whose a checkpoint directory is: the last run that came to write into it.

A run that starts to write puts a random token into the directory. Whoever finds there a token that
is not its own has been replaced, and stops. So of two runs in one folder, however they came to be
there, the later one goes on and the earlier one ends with an error at its next save.

There is no lock: on the storage that clusters share, locks do not exist or outlive the machine
that took them, and leases need clocks that agree. A token needs neither, nobody must remove it, and
a run that was killed leaves nothing that is in the way of its restart.
"""

from __future__ import annotations

import json
import os
import platform
import secrets

from etils import epath

from moejax.errors import UserError

FILE = ".writer"


class WriterToken:
    """This run's token in `directory`. Until `take` there is none, and `check` accepts everything.

    What happens between a check and what follows it cannot be excluded by any file; the earlier run
    could still finish the one save or deletion that it had begun. Both are harmless: its
    checkpoints are sound, and the later run sets aside those of steps that it comes to itself.
    """

    def __init__(self, directory: epath.Path):
        self._file = directory / FILE
        self._mine: str | None = None

    def take(self) -> None:
        """Makes the directory this run's. Raises OSError where it cannot be written."""
        token = secrets.token_hex(16)
        described = {"token": token, "host": platform.node(), "process": os.getpid()}
        self._file.write_text(json.dumps(described) + "\n")
        self._mine = token

    def replaced_by(self) -> str | None:
        """Who has taken the directory since, in words; None where it is still this run's."""
        if self._mine is None:
            return None
        try:
            found = json.loads(self._file.read_text())
            if found["token"] == self._mine:
                return None
            return f"process {found['process']} on {found['host']}"
        except FileNotFoundError:
            return "somebody who removed this run's token"
        except (OSError, ValueError, KeyError, TypeError):
            return f"somebody whose token in {self._file} cannot be read"

    def check(self) -> None:
        """Raises UserError where another run has taken the directory."""
        other = self.replaced_by()
        if other is not None:
            raise UserError(
                f"another run now writes to {self._file.parent} ({other}): this one stops and "
                "writes nothing more; let one run alone have a workdir"
            )
