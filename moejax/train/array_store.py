"""Writes and reads named arrays through Orbax, in the form that it can store.

Orbax refuses empty arrays and has its own format for PRNG keys; here keys become their key data,
and an array without elements is not stored but made anew.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import logging
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from moejax.train import processes

_STATE, _MANIFEST, _MANIFEST_FILE = "state", "manifest", "manifest.json"
_READ_TOGETHER = 2**25  # bytes of leaves, at least; or this part of all of them
_TURNS = 24


class _LateJson(ocp.AsyncCheckpointHandler):
    """Writes a JSON value that is known only when the arrays are already being written."""

    async def async_save(self, directory: epath.Path, args: _SaveLateJson) -> list[Any]:
        return [ocp.future.CommitFutureAwaitingContractedSignals(self.write(directory, args))]

    async def write(self, directory: epath.Path, args: _SaveLateJson) -> None:
        if processes.is_first():
            (directory / _MANIFEST_FILE).write_text(json.dumps(args.value()))

    def save(self, directory: epath.Path, args: _SaveLateJson) -> None:
        raise NotImplementedError("Orbax calls `async_save`")

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        raise NotImplementedError("`ArrayStore.read_manifest` reads it")


@ocp.args.register_with_handler(_LateJson, for_save=True, for_restore=True)  # Orbax wants both
@dataclasses.dataclass
class _SaveLateJson(ocp.args.CheckpointArgs):
    value: Callable[[], Any]


class ArrayStore:
    """One asynchronous writer and one reader of checkpoint directories."""

    def __init__(self, *, timeout_seconds: int):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_news)
        _ignore_late_errors()
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{
                    _STATE: ocp.PyTreeCheckpointHandler(),
                    _MANIFEST: _LateJson(),
                }
            ),
            timeout_secs=timeout_seconds,
        )
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def write(
        self, path: epath.Path, leaves: Mapping[str, jax.Array], manifest: Callable[[], Any]
    ) -> None:
        """Starts to write {path: array} and a JSON value; `path` appears when all of it is there.

        Returns once the arrays are copied. `manifest`, which gives the JSON value, is called in
        the background. Errors from there come from `check` and `wait`.
        """
        state = ocp.args.PyTreeSave(_storable(leaves))
        args = {_STATE: state, _MANIFEST: _SaveLateJson(manifest)}
        self._writer.save(path, args=ocp.args.Composite(**args))

    def check(self) -> None:
        """Raises the background's error, once; does not block."""
        self._writer.check_for_errors()

    def wait(self) -> None:
        """Blocks until the background is done; raises its error, once."""
        self._writer.wait_until_finished()

    def close(self) -> None:
        self._writer.close()
        self._reader.close()

    def read_manifest(self, path: epath.Path) -> str:
        return (path / _MANIFEST / _MANIFEST_FILE).read_text()

    def read(self, path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The leaves named in `wanted` (path -> abstract with sharding), laid out as asked."""
        found: dict[str, Any] = {}
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        for target in _in_turns(_storable(wanted)):
            found |= self._reader.restore(
                path / _STATE,
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
            if give_back is not None:  # what reading took, for its threads would keep it
                give_back(0)
        return {name: _from_storable(found.get(name), like) for name, like in wanted.items()}


def _in_turns(target: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The leaves in groups: a leaf that is being read takes up to three times its size."""
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    limit = max(_READ_TOGETHER, sum(map(size, target.values())) // _TURNS)
    group: dict[str, Any] = {}
    for name, leaf in target.items():
        if group and sum(map(size, group.values())) + size(leaf) > limit:
            yield group
            group = {}
        group[name] = leaf
    if group:
        yield group


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _key_data(x) if _is_key(x) else x for name, x in leaves.items() if x.size}


def _key_data(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    # The key's own axes come first, so its sharding is that of the words too.
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _from_storable(stored: Any, like: Any) -> jax.Array:
    if like.size == 0:
        return jax.device_put(jnp.zeros(like.shape, like.dtype), like.sharding)
    if _is_key(like):
        return jax.random.wrap_key_data(stored, impl=_key_implementation(like))
    return stored


def _key_implementation(like: Any) -> Any:
    found = []  # jax tells it only for arrays, and a traced value is one
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Orbax and asyncio log about a failed call, which raises its first error."""
    text = record.getMessage()
    leftover = "never retrieved" in text and ("orbax" in text or "tensorstore" in text)
    return not leftover and not (record.exc_info and "orbax" in record.pathname)


def _ignore_late_errors() -> None:
    """Silences what the other reads or writes of a failed call print after it was raised.

    Orbax stops at the first error and closes its event loop under the rest of them, and Python
    prints an unraisable error for each. All that is not of that kind goes to the hook before.
    """
    before = sys.unraisablehook
    if getattr(before, "ignores_late_errors", False):
        return

    def hook(event):
        loop_closed = str(event.exc_value) == "Event loop is closed"
        if not loop_closed and "orbax" not in _last_file(event.exc_traceback):
            before(event)

    hook.ignores_late_errors = True
    sys.unraisablehook = hook


def _last_file(trace: types.TracebackType | None) -> str:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


_REASONS = {
    errno.ENOSPC: (r"ENOSPC|No space left", "the disk is full"),
    errno.EDQUOT: (r"EDQUOT|quota exceeded", "the disk quota is used up"),
    errno.EROFS: (r"EROFS|Read-only file system", "the file system is read-only"),
    errno.EACCES: (r"EACCES|EPERM|Permission denied", "permission is denied"),
    errno.ENOTDIR: (r"ENOTDIR|EEXIST|Not a directory|File exists", "a file is in the way"),
    errno.EFBIG: (r"EFBIG|File too large", "a file would exceed the allowed size"),
}


def reason(error: BaseException | None) -> str:
    """Why reading or writing failed, in a few words and on one line.

    What TensorStore said is at the root of the chain, names the leaf, and ends in its settings.
    """
    while error is not None and (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0]
    text = re.sub(r' in OCDBT database at local file "[^"]*"', "", text)
    for code, (pattern, words) in _REASONS.items():
        if getattr(error, "errno", None) == code or re.search(pattern, text, re.IGNORECASE):
            return words
    return f"{type(error).__name__}: {text[:160]}"
