"""Calls the training step: compiled in a phase of its own, profiled and dumped on request."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

from moejax.errors import UserError
from moejax.train import phases, processes
from moejax.train.profiler import PROFILE, Profiler, Window
from moejax.train.state import TrainState
from moejax.train.step import Metrics, Step
from moejax.types import Batch

HLO = "hlo"  # folder in the workdir

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What to write down about a run's step: `profile` which steps, `dump_hlo` its program."""

    profile: Window | None = None
    dump_hlo: bool = False


class RunStep:
    """A `Step` that is compiled before its first call. `start` steps were done before.

    One that is no jitted function is compiled by its first call, if at all, and has no program to
    dump: UserError where that is asked for.
    """

    def __init__(self, step: Step, inspection: Inspection, workdir: pathlib.Path, *, start: int):
        self._step, self._workdir, self._done, self._is_compiled = step, workdir, start, False
        self._dump_hlo = inspection.dump_hlo
        window = inspection.profile
        if window is not None and window.first + window.count <= start:
            window = None  # an earlier session of the same command has come by
        self._profiler = Profiler(workdir / PROFILE, window)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not self._is_compiled:
            with phases.phase("compile", self._done):
                self._compile(state, batch)
            self._is_compiled = True
            phases.enter("first step", self._done)
        self._profiler.before_step(self._done, state)
        self._done += 1
        return self._step(state, batch)

    def _compile(self, state: TrainState, batch: Batch) -> None:
        if not hasattr(self._step, "lower"):
            if self._dump_hlo:
                raise UserError("--dump-hlo: this run's step is a plain function, not a jitted one")
            return
        lowered = self._step.lower(state, batch)
        compiled = lowered.compile()  # the call finds it: JAX keeps it with the lowered program
        if self._dump_hlo and processes.is_first():
            folder = self._workdir / HLO
            texts = {"lowered": lowered.as_text(), "compiled": compiled.as_text()}
            try:
                folder.mkdir(exist_ok=True)
                for name, text in texts.items():
                    (folder / f"train_step.{name}.txt").write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"--dump-hlo: cannot write to {folder}: {error}") from error
            _log.info("the program of the step: %s", folder)

    def __enter__(self) -> RunStep:
        self._profiler.__enter__()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._profiler.__exit__()
