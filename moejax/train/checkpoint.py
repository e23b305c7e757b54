"""Asynchronous checkpoints that prove, when they are read, that they are what was saved.

Orbax (OCDBT) writes the arrays; this file adds what it does not promise:

- **Every leaf carries a fingerprint** (`fingerprint.py`), recomputed on restore: Orbax restores a
  flipped bit without an error. "Latest" is the newest checkpoint that validates.
- **Restore always uses the target's sharding**, never the saved one, whatever the device count.
- **An error in the background stops the run**: `check_error` costs nothing and goes in every step.
- **Nothing committed is lost** to a failed save: a step appears under its name by one rename, and
  the keep policy deletes only after the newer one is in place.
- Only the content of the directory counts, no cache of it (`step_directory.py`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from moejax.errors import UserError
from moejax.train import processes
from moejax.train.array_store import ArrayStore, reason
from moejax.train.fingerprint import fingerprints
from moejax.train.manifest import (
    CorruptCheckpoint,
    Leaf,
    Manifest,
    check_leaves,
    check_structure,
    start_manifest,
)
from moejax.train.retention import Keep
from moejax.train.step_directory import StepDirectory
from moejax.train.writer_token import WriterToken
from moejax.types import named_leaves

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a restore found: the state, the caller's JSON saved with it, and the step."""

    state: Any
    extra: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and restores one run's state in `directory`.

    In a run of several processes all of them make the same calls with the same global arrays.
    Nothing is made or deleted before the first `start_writing` or `save`, so that reading is
    safe beside a run that writes. Of two that write the later one goes on (`writer_token.py`).
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep: Keep = Keep(),  # noqa: B008
        *,
        timeout_seconds: int = 1200,
    ):
        self.directory = StepDirectory(directory)
        self._token = WriterToken(self.directory.root)
        self.problems: list[str] = []  # checkpoints that the last restore had to pass over
        self._keep = keep
        self._pending: int | None = None  # step whose background write is not yet known to be good
        self._written: tuple[int, Callable[[], dict[str, Leaf]]] | None = None
        self._base: int | None = None  # the newest step of this run's own timeline
        self._store = ArrayStore(timeout_seconds=timeout_seconds)

    # ---- what is there -----------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Committed steps on storage, ascending. Their content is validated only on restore."""
        return self.directory.steps()

    def manifest(self, step: int) -> Manifest:
        """The manifest of one checkpoint. Raises CorruptCheckpoint where it is not as written."""
        try:
            text = self._store.read_manifest(self.directory.path(step))
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint("its manifest is missing or not readable") from error
        found = Manifest.from_text(text)
        if found.step != step:
            raise CorruptCheckpoint(f"its manifest is that of step {found.step}")
        return found

    # ---- saving ------------------------------------------------------------------------------

    def start_writing(self) -> None:
        """Makes the directory and takes it from whoever wrote there before.

        So a run fails before its first step where it cannot write.
        """

        def take() -> None:
            self.directory.make()
            self._token.take()

        try:
            processes.by_first(take)
        except (OSError, ImportError) as error:  # of a library for a kind of storage
            raise UserError(
                f"cannot write checkpoints to {self.directory.root}: {reason(error)}; choose "
                "another workdir or put that right"
            ) from error

    def prepare(self, state: Any) -> None:
        """Compiles what the first `save` of such a state would have to wait for."""
        start_manifest(0, named_leaves(state), {})

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Starts to save `state` (a pytree of arrays and PRNG keys) as `step`.

        Returns once the arrays are copied, so the caller may donate them; writing goes on in the
        background. `extra` is plain JSON: data position and fingerprint, metrics under "metrics".
        Saving again what this object has just saved as the same step does nothing.
        Raises UserError where the previous save failed or this one cannot start.
        """
        self.wait()
        leaves = {path: jnp.asarray(x) for path, x in named_leaves(state).items()}
        described, manifest = start_manifest(step, leaves, extra)
        if processes.all_agree(self._has_written(step, described)):
            return
        try:
            self._prepare(step)
            self._store.write(self.directory.path(step), leaves, manifest)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(step, error) from error
        self._pending, self._written = step, (step, described)

    def _has_written(self, step: int, described: Callable[[], dict[str, Leaf]]) -> bool:
        if self._written is None or self._written[0] != step or step not in self.steps():
            return False
        return self._written[1]() == described()

    def _prepare(self, step: int) -> None:
        """Clears leftovers, and checkpoints of a timeline that this run has left.

        Those are the ones later than the step it resumed from, and any at `step` or later.
        Raises UserError where the directory is another run's by now.
        """
        first = step if self._base is None else min(step, self._base + 1)

        def prepare() -> None:
            self._token.check()
            self.directory.make()
            self.directory.clean()
            for later in (s for s in self.steps() if s >= first):
                self.directory.set_aside(later)

        processes.by_first(prepare)

    def check_error(self) -> None:
        """Raises UserError where the background write has failed. Cheap: call it every step."""
        try:
            self._store.check()
        except Exception as error:
            raise self._write_error(self._pending, error) from error

    def wait(self) -> None:
        """Blocks until the pending save is on storage, then applies the keep policy.

        Raises UserError where it failed.
        """
        try:
            self._store.wait()
        except Exception as error:
            raise self._write_error(self._pending, error) from error
        if self._pending is not None:
            self._base, self._pending = self._pending, None
            if processes.is_first() and self._token.replaced_by() is None:
                self._keep.apply(self.directory, self.manifest)

    def close(self) -> None:
        """Waits for the pending save and frees the background machinery."""
        try:
            self.wait()
        finally:
            self._store.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _write_error(self, step: int | None, error: BaseException) -> UserError:
        self._pending = self._written = None
        try:
            self._token.check()  # a run that came later clears what the earlier one was writing
        except UserError as replaced:
            return replaced
        with contextlib.suppress(OSError):
            if processes.is_first():
                self.directory.clean()  # a full disk needs the space
        intact = ", ".join(map(str, self.steps())) or "none yet"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.directory.root}: "
            f"{reason(error)}; earlier checkpoints are untouched (steps: {intact}): put that right "
            "or choose another workdir, then resume"
        )

    # ---- restoring ---------------------------------------------------------------------------

    def restore(
        self, abstract_state: Any, step: int | None = None, *, before: int | None = None
    ) -> Restored:
        """The newest checkpoint that validates, or exactly `step`, laid out as `abstract_state`.

        `abstract_state` is a pytree of ShapeDtypeStructs with shardings (or of arrays). With
        `before`, only checkpoints of earlier steps are looked at. A corrupt checkpoint is named
        in a warning and in `problems`, and the one before it is used; with `step` given it is an
        error instead. Raises UserError where nothing can be used, or where the checkpoint holds
        another experiment's state (which never counts as corruption).
        """
        wanted = named_leaves(abstract_state)
        found = self._restore(wanted, step, check_structure, before)
        self._base = found.step
        treedef = jax.tree.structure(abstract_state)
        return found._replace(state=jax.tree.unflatten(treedef, found.state.values()))

    def restore_leaves(self, wanted: dict[str, Any], step: int | None = None) -> Restored:
        """Like `restore`, for the leaves named in `wanted` (path -> abstract) alone.

        Reads only those, e.g. parameters without the optimizer. `state` is a {path: array}.
        """
        return self._restore(wanted, step, check_leaves)

    def _restore(self, wanted, step, check, before: int | None = None) -> Restored:
        self.wait()
        self._written, self.problems = None, []
        for path, abstract in wanted.items():
            if getattr(abstract, "sharding", None) is None:
                raise ValueError(f"restore: the abstract leaf {path} needs a sharding")
        newest_first = [s for s in self.steps()[::-1] if before is None or s < before]
        candidates = processes.from_first(newest_first if step is None else [step])
        for candidate in candidates:
            try:
                manifest = self._agreed_manifest(candidate)
                source = f"the checkpoint {self.directory.path(candidate)}"
                check(manifest, wanted, source=source)
                state = self._read_valid(manifest, wanted)
            except CorruptCheckpoint as error:
                self._note(candidate, error)
            else:
                return Restored(state, manifest.extra, candidate)
        raise UserError(self._nothing_usable(step, before))

    def _agreed_manifest(self, step: int) -> Manifest:
        try:
            manifest, problem = self.manifest(step), None
        except CorruptCheckpoint as error:
            manifest, problem = None, error
        if not processes.all_agree(manifest is not None):
            raise problem or CorruptCheckpoint("another process cannot read its manifest")
        return manifest

    def _note(self, step: int, error: CorruptCheckpoint) -> None:
        self.problems.append(f"step {step}: {error}")
        _log.warning(
            "the checkpoint %s is corrupt and is not used: %s", self.directory.path(step), error
        )

    def _nothing_usable(self, step: int | None, before: int | None) -> str:
        none = "no checkpoint" if before is None else f"no checkpoint before step {before}"
        if not self.problems:
            return f"there is {none} in {self.directory.root}; train first, or check the path"
        which = none if step is None else f"the checkpoint of step {step} is not usable"
        return (
            f"{which} in {self.directory.root}{' can be used' if step is None else ''}: "
            f"{'; '.join(self.problems)}; restore the files from a copy, or "
            + ("start in another workdir" if step is None else f"use one of {self.steps()}")
        )

    def _read_valid(self, manifest: Manifest, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        try:
            state = self._store.read(self.directory.path(manifest.step), wanted)
            failure = None
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # memory, not the files
                raise
            state, failure = {}, error
        if not processes.all_agree(failure is None):
            raise CorruptCheckpoint(f"its files are damaged ({reason(failure)})") from failure
        marks = fingerprints(state)
        bad = [path for path in wanted if marks[path] != manifest.leaves[path].fingerprint]
        if not processes.all_agree(not bad):
            name = bad[0] if bad else "that another process checked"
            raise CorruptCheckpoint(f"the leaf {name} is not what was saved ({len(bad)} differ)")
        return state
