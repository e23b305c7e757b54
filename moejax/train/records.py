"""One record of a run to every writer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from moejax.experiment import Experiment
from moejax.train import processes
from moejax.train.writers import METRICS, JsonLines, TensorBoard, Writer


class Records:
    """Stamps records with the time and hands each to all `writers`; closes them at the end."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """`kind` is "run", "train", "eval" or "event"; values that are None are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        record = {"kind": kind, "step": step, "time": time.time(), "values": known}
        for writer in self._writers:
            writer.write(record)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *unused) -> None:
        for writer in self._writers:
            writer.close()


def open_records(experiment: Experiment, start: int) -> Records:
    """Those of a session that starts at that step: the first process writes, the others nothing."""
    if not processes.is_first():
        return Records()
    workdir = Path(experiment.workdir)
    evaluated = start - (start == experiment.steps)  # the last evaluation is made in any case
    return Records(
        JsonLines(workdir / METRICS, resume_step=start, last_eval=evaluated),
        TensorBoard(workdir / "tensorboard", resume_step=start),
    )
