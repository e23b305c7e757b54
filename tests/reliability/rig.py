"""Kills a training run again and again, and compares what comes out with a run that nobody killed.

    python -m tests.reliability.rig FOLDER --kills 20 --seed 7

A run is started, killed, and started again by the same command; each restart is the next victim,
until the run is at its end or has been killed often enough to be let go. Then every leaf of its
state, every record and every folder must be as if nothing had happened.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import select
import shutil
import signal
import sys
import time

from tests.reliability import outcome, victim
from tests.reliability.file_events import FileEvents
from tests.reliability.kills import AFTER_TWO_SAVES, Kill, plan

STEPS = 12
PATIENCE = 300.0  # seconds in which any session must end
_MOST_PER_RUN = 12

_OVERRIDES = (
    *(f"steps={STEPS}", "checkpoint_every=2", "eval_every=4", "log_every=1", "keep_last=2"),
    *("model.num_layers=1", "model.d_model=16", "sequence_length=32", "prompts=()"),
    "optimizer.schedule.warmup_steps=2",
    "model.block.ffn.balance.0=moejax.balance.loss_free:LossFreeBias",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """One process: how it ended (`None`: it was killed), where it was, and how long it lived."""

    status: int | None
    last_place: str
    seconds: float


class Run:
    """A run in a folder of its own, with its own data cache, and all of its sessions."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.workdir = folder, folder / "run"
        folder.mkdir(parents=True)
        self._passed, self.log = folder.with_suffix(".passed"), folder.with_suffix(".log")
        self._damaged: set[int] = set()  # inodes, for a step may be saved anew
        paths = (f"workdir={self.workdir}", f"data.cache_dir={folder / 'data'}")
        self._words = ["train", "configs/tiny.py:smoke", *_OVERRIDES, *paths]

    def session(self, kill: Kill) -> Session:
        """Starts the command, waits until it has ended or was killed."""
        start = time.monotonic()
        with FileEvents(self.folder, within=kill.within) as events:
            pid = victim.start(
                self._words, log=str(self.log), passed=str(self._passed), place=kill.place
            )
            status = _watched(pid, kill, events, start)
        passed = self._passed.read_text().split("\n") if self._passed.exists() else []
        return Session(
            status=status,
            last_place=passed[-2] if len(passed) > 1 else "start",
            seconds=time.monotonic() - start,
        )

    def sound(self) -> list[int]:
        """The committed steps without those that were damaged here."""
        folder = self.workdir / outcome.CHECKPOINTS
        inode = lambda step: (folder / f"step_{step:08d}").stat().st_ino
        return [s for s in outcome.committed(self.workdir) if inode(s) not in self._damaged]

    def damage_newest(self) -> None:
        """Flips a bit in the largest file of the newest sound checkpoint."""
        folder = self.workdir / outcome.CHECKPOINTS / f"step_{self.sound()[-1]:08d}"
        files = (path for path in folder.rglob("*") if path.is_file())
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content)
        self._damaged.add(folder.stat().st_ino)

    def problems(self, reference: "Run | None") -> list[str]:
        """In which ways the finished run is not the one that nobody killed."""
        # Not in the data cache: there the next build clears up, and this run needs no further one.
        found = [f"left over: {path}" for path in outcome.leftovers(self.workdir)]
        wanted = [STEPS - 2, STEPS]
        if outcome.committed(self.workdir) != wanted:
            return [*found, f"checkpoints {outcome.committed(self.workdir)}, not {wanted}"]
        if not (self.workdir / "report" / "index.html").exists():
            found.append("no report")
        try:
            ours = outcome.figures(self.workdir)
        except AssertionError as error:
            return [*found, str(error)]
        if reference is not None:
            theirs = outcome.figures(reference.workdir)
            found += _differences("record", ours, theirs)
            for step in wanted:
                digests = (outcome.digests(run.workdir, step) for run in (self, reference))
                found += _differences(f"step {step}, leaf", *digests)
        return found


def _watched(pid: int, kill: Kill, events: FileEvents, start: float) -> int | None:
    """The exit status, or None where the process was killed as `kill` says."""
    ended, count = os.pidfd_open(pid), 0
    try:
        while True:
            limit = PATIENCE if kill.seconds is None else kill.seconds
            left = start + limit - time.monotonic()
            ready, _, _ = select.select([ended, events], [], [], max(left, 0))
            if ended in ready:
                break
            count += events.read() if events in ready else 0
            if left <= 0 or (kill.events is not None and count >= kill.events):
                os.kill(pid, signal.SIGKILL)
                if left <= 0 and kill.seconds is None:
                    os.waitpid(pid, 0)
                    raise AssertionError(f"a session took longer than {PATIENCE} s ({kill})")
    finally:
        os.close(ended)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"it died of signal {os.WTERMSIG(status)}"
        return None
    return os.WEXITSTATUS(status)


def _differences(what: str, ours: dict, theirs: dict) -> list[str]:
    names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    return [f"{what} {name} differs" for name in names]


class Rig:
    """Takes kills from a plan, run after run. `results` has one entry per kill."""

    def __init__(self, folder: pathlib.Path, *, echo=lambda text: None):
        self._folder, self._echo, self._runs = folder, echo, 0
        self.results: list[dict] = []
        self.failures: list[str] = []
        self._warm_up()

    def _warm_up(self) -> None:
        """The run that nobody kills. The first one, thrown away, fills the compilation cache."""
        for name in ("cold", "reference"):
            self.reference = Run(self._folder / name)
            session = self.reference.session(Kill())
            assert session.status == 0, self.reference.log.read_text()[-3000:]
        self.seconds = session.seconds
        assert not self.reference.problems(None), self.reference.problems(None)

    def do(self, kills: list[Kill]) -> None:
        """Carries out all of `kills`, in as many runs as that needs."""
        waiting = list(reversed(kills))
        while waiting:
            self._runs += 1
            run = Run(self._folder / f"run-{self._runs}")
            before = len(self.failures)
            with contextlib.suppress(_Failed):
                self._one_run(run, waiting)
            if len(self.failures) == before:
                shutil.rmtree(run.folder)
            else:
                self._echo("\n".join([*self.failures[before:], run.log.read_text()[-3000:]]))

    def _one_run(self, run: Run, waiting: list[Kill]) -> None:
        for number in range(_MOST_PER_RUN + 1):
            kill = waiting[-1] if waiting and number < _MOST_PER_RUN else Kill()
            if kill.needs_saves and len(run.sound()) < 2:
                kill = AFTER_TWO_SAVES
            elif kill.damaged:
                run.damage_newest()
            before, known = run.sound(), len(outcome.starts(run.workdir))
            session = run.session(kill)
            self._check_start(run, kill, outcome.starts(run.workdir)[known:], before)
            if session.status is None:
                self._note(kill, session, before, run)
                if kill is waiting[-1]:
                    waiting.pop()
                continue
            used = bool(waiting) and kill is waiting[-1]
            if used and (kill.place is None or number == 0):
                waiting.pop()  # it came too late, and would again
            if session.status != 0:
                self._fail(run, f"{kill} ended with status {session.status}")
            if kill.place is not None and number == 0:
                self._fail(run, f"{kill.place} was never reached")
            for problem in run.problems(self.reference):
                self.failures.append(f"{run.folder.name}: {problem}")
            return

    def _check_start(self, run: Run, kill: Kill, began: list[int], before: list[int]) -> None:
        newest = before[-1] if before else 0
        if began not in ([], [newest]):
            self._fail(run, f"{kill}: it went on from {began}, and {newest} was committed")

    def _note(self, kill: Kill, session: Session, before: list[int], run: Run) -> None:
        after = run.sound()
        self.results.append(
            {
                "kind": kill.kind,
                "place": session.last_place,
                "damaged": kill.damaged,
                "before": before,
                "after": after,
                "seconds": round(session.seconds, 2),
            }
        )
        self._echo(f"{len(self.results)}: {run.folder.name} {json.dumps(self.results[-1])}")
        if before and (not after or after[-1] < before[-1]):
            self._fail(run, f"{kill}: checkpoints {before} became {after}")

    def _fail(self, run: Run, text: str) -> None:
        self.failures.append(f"{run.folder.name}: {text}")
        raise _Failed


class _Failed(Exception):
    pass


def main() -> int:
    """Carries out a plan, prints every kill, and writes all of it to FOLDER/results.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    victim.import_everything()
    rig = Rig(args.folder.resolve(), echo=lambda text: print(text, flush=True))
    print(
        f"seed {args.seed}, {args.kills} kills; a whole run takes {rig.seconds:.1f} s", flush=True
    )
    rig.do(plan(args.seed, args.kills, seconds=rig.seconds))
    found = {"seed": args.seed, "results": rig.results, "failures": rig.failures}
    (args.folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(rig.failures) or "no failure")
    return bool(rig.failures)


if __name__ == "__main__":
    sys.exit(main())
