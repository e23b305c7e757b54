"""The directory of a run's checkpoints: which steps are there, and how they come and go.

`step_00000010` is a checkpoint. `*.orbax-checkpoint-tmp*` and `*.deleting` are leftovers of a
killed process: never read, and removed by `clean`. `*.superseded` are checkpoints of a
timeline that a run left by going on from an earlier step: never read, and deleted by the rule in
`retention.py`.
"""

from __future__ import annotations

import logging
import re

from etils import epath

_log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d+)")
_SUPERSEDED = re.compile(r"step_(\d+)\.superseded(\.\d+)?")
_LEFTOVER = re.compile(r"step_\d+\.(orbax-checkpoint-tmp.*|(superseded\.(\d+\.)?)?deleting)")


class StepDirectory:
    """Names, lists, renames and deletes; knows nothing of what is inside a checkpoint.

    Only the storage counts: nothing is remembered between calls, so that a failed save never
    looks like the latest step.
    """

    def __init__(self, directory: epath.PathLike):
        text = str(directory)
        self.root = epath.Path(text) if "://" in text else epath.Path(text).resolve()

    def path(self, step: int) -> epath.Path:
        """Where the checkpoint of `step` is or will be."""
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        if not self.root.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def superseded(self) -> dict[epath.Path, int]:
        """Every checkpoint that was set aside, and its step."""
        found = {path: _SUPERSEDED.fullmatch(path.name) for path in self.root.iterdir()}
        return {path: int(match[1]) for path, match in found.items() if match}

    def make(self) -> None:
        """Makes the directory and, to be sure, a file in it. Raises OSError where it cannot."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / ".writable"
        probe.write_text("x")
        probe.unlink()

    def clean(self) -> None:
        """Removes what killed or failed saves and deletions left."""
        for path in self.root.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.rmtree(missing_ok=True)

    def set_aside(self, step: int) -> None:
        """Renames the checkpoint of `step`, so that it no longer counts but is not lost."""
        path, number = self.path(step), 0
        target = self.root / f"{path.name}.superseded"
        while target.exists():
            number += 1
            target = self.root / f"{path.name}.superseded.{number}"
        path.rename(target)
        _log.warning("this run goes on from an earlier step: %s is now %s", path, target.name)

    def delete(self, path: epath.Path) -> None:
        """Deletes a checkpoint; a failure is a warning, for nothing depends on it."""
        doomed = self.root / f"{path.name}.deleting"
        try:  # renamed first, so that half a deletion never looks like a checkpoint
            path.rename(doomed)
            doomed.rmtree()
        except OSError as error:
            _log.warning("the old checkpoint %s could not be deleted: %s", path, error)
