"""The frozen parameters of a run, in the folder `frozen` beside its checkpoints.

They are stored once, before the first step, in the dtype in which they are used; checkpoints
hold the rest. At the end of the run their fingerprints are compared with what was stored.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from moejax.errors import UserError
from moejax.train import processes
from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import fingerprints
from moejax.train.manifest import CorruptCheckpoint, Leaf
from moejax.types import named_leaves

FROZEN = "frozen"


def save(workdir: pathlib.Path, frozen: Any) -> None:
    """Stores the frozen parameters of a run that begins; nothing where none is frozen."""
    if not named_leaves(frozen):
        return
    with _store(workdir) as store:
        store.start_writing()
        processes.by_first(lambda: _clear(store))  # a run that was killed before its first step
        store.save(0, {"params": frozen}, {})


def stored(workdir: pathlib.Path) -> dict[str, Leaf]:
    """{path: what is known of it} of every frozen parameter; empty where none is.

    Raises UserError where the folder is damaged.
    """
    if not (workdir / FROZEN).exists():
        return {}
    with _store(workdir) as store:
        try:
            return store.manifest(0).leaves
        except CorruptCheckpoint as error:
            raise UserError(
                f"the frozen parameters in {store.directory.root} cannot be read: {error}; "
                "restore the files from a copy, or start in another workdir"
            ) from error


def directory(workdir: pathlib.Path) -> pathlib.Path:
    """Where the arrays are."""
    with _store(workdir) as store:
        return pathlib.Path(store.directory.path(0))


def restore(workdir: pathlib.Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """{path: array}, laid out as `wanted` (path -> abstract with sharding) says.

    The paths begin with `params/`. Each array has the dtype in which it was stored.
    Raises UserError where one is missing or is not what was saved.
    """
    if not wanted:
        return {}
    known = stored(workdir)
    dtype = lambda path, like: known[path].dtype if path in known else like.dtype
    typed = {
        path: jax.ShapeDtypeStruct(like.shape, dtype(path, like), sharding=like.sharding)
        for path, like in wanted.items()
    }
    with _store(workdir) as store:
        return store.restore_leaves(typed, step=0).state


def check_unchanged(workdir: pathlib.Path, frozen: Any) -> int:
    """How many leaves are frozen; UserError where one is not, bit for bit, what was stored."""
    found = fingerprints({"params": frozen})
    if not found:
        return 0
    known = stored(workdir)
    for path, mark in found.items():
        if path not in known or known[path].fingerprint != mark:
            raise UserError(
                f"the frozen parameter {path} is no longer what it was when the run began: this "
                "is a defect of moejax or of the machine, and the run's results cannot be trusted"
            )
    return len(found)


def _store(workdir: pathlib.Path) -> Checkpointer:
    return Checkpointer(str(workdir / FROZEN))


def _clear(store: Checkpointer) -> None:
    for step in store.steps():
        store.directory.delete(store.directory.path(step))
