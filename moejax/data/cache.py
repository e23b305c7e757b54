"""A folder of arrays on disk that is either whole and current, or noticed and built again.

Used for tokenised documents and for row indices. An entry is written into a hidden workspace
beside its place and renamed, so a killed process leaves no half entry and several processes may
build the same one. The workspace that it does leave is removed by the next build.

`meta.json` holds the entry's fingerprint, and the shape, dtype and checksums of every array; they
are compared each time an entry is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint as values_fingerprint

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 * 2**20
MAX_BLOCKS_CHECKED = 512  # 2 GiB per array; of a larger one an even sample and both ends

_WORKSPACE = ".building-"
_OWNER = "owner"  # locked by whoever builds, for as long as he lives

Arrays = dict[str, np.ndarray]


class ArrayWriter:
    """Appends to the arrays of one entry; only whole blocks are held in memory."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._dtypes: dict[str, str] = {}
        self._lengths: dict[str, int] = {}
        self._files: dict = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds `values` (1-D) to the end of array `name`; its dtype is that of the first call."""
        if name not in self._files:
            self._files[name] = open(self._folder / f"{name}.bin", "wb")  # noqa: SIM115
            self._dtypes[name], self._lengths[name] = values.dtype.str, 0
        if values.dtype.str != self._dtypes[name]:
            raise TypeError(f"array {name} is {self._dtypes[name]}, not {values.dtype.str}")
        self._files[name].write(np.ascontiguousarray(values).data)
        self._lengths[name] += len(values)

    def close(self, fingerprint: str, info: dict) -> None:
        """Writes every array to disk, then `meta.json`."""
        arrays = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            checks = _checksums(self._folder / f"{name}.bin", None)
            arrays[name] = {
                "dtype": self._dtypes[name],
                "length": self._lengths[name],
                "crc32": checks,
            }
        meta = {"fingerprint": fingerprint, "info": info, "arrays": arrays}
        meta["check"] = _digest(meta)
        (self._folder / "meta.json").write_text(json.dumps(meta) + "\n")

    def abandon(self) -> None:
        for file in self._files.values():
            file.close()


def open_or_build(
    folder: pathlib.Path, fingerprint: str, build: Callable[[ArrayWriter], dict], *, what: str
) -> tuple[Arrays, dict]:
    """The arrays of an entry (memory-mapped, read-only) and its info.

    Args:
      folder: the entry's place; its parents are made as needed.
      fingerprint: of everything the entry was computed from. Another one on disk is stale.
      build: fills the entry through the writer and returns `info` (JSON-able).
      what: the entry in words, for messages.

    Raises:
      DataError: the folder cannot be written, or the disk is full.
    """
    if folder.exists():
        try:
            return _open(folder, fingerprint)
        except _Unusable as e:
            log.warning("%s in %s is %s: building it again", what, folder, e)
    try:
        _build(folder, fingerprint, build)
        return _open(folder, fingerprint)
    except OSError as e:
        raise DataError(
            f"cannot write {what} to {str(folder)!r} ({e.strerror or e}): set data.cache_dir or "
            "MOEJAX_CACHE to a folder that can be written and has room"
        ) from e
    except _Unusable as e:
        raise DataError(
            f"{what} in {str(folder)!r} is {e} right after writing: check the disk"
        ) from e


class _Unusable(Exception):
    """Why an entry cannot be used."""


def _build(folder: pathlib.Path, fingerprint: str, build: Callable[[ArrayWriter], dict]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    with _workspace(folder) as workspace:
        new = workspace / "new"
        new.mkdir()
        writer = ArrayWriter(new)
        try:
            writer.close(fingerprint, build(writer))
        finally:
            writer.abandon()
        _replace(new, folder, workspace)


@contextlib.contextmanager
def _workspace(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder beside `folder`, with a file that is locked until this process is done."""
    path = pathlib.Path(tempfile.mkdtemp(prefix=f"{_WORKSPACE}{folder.name}-", dir=folder.parent))
    try:
        with open(path / "unlocked", "w") as owner:
            owner.write(platform.node())
            owner.flush()
            # Where locks do not work the name stays, and nobody takes the build for abandoned.
            with contextlib.suppress(OSError):
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(path / "unlocked", path / _OWNER)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(parent: pathlib.Path) -> None:
    """Removes the workspaces of killed processes of this machine.

    Those of other machines stay: some file systems do not show one machine the locks of another.
    """
    for workspace in parent.glob(f"{_WORKSPACE}*"):
        try:
            with open(workspace / _OWNER, "r+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if owner.read() == platform.node():
                    log.info("removing %s, which a killed process has left", workspace)
                    shutil.rmtree(workspace, ignore_errors=True)
        except OSError:  # its process lives, or has just gone and took it along
            continue


def _replace(new: pathlib.Path, folder: pathlib.Path, workspace: pathlib.Path) -> None:
    """Puts `new` in the place of `folder`; whoever comes last wins, all have the same."""
    for attempt in range(10):
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, workspace / f"old-{attempt}")
        try:
            os.replace(new, folder)
            return
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # no race with another process
                raise


def _open(folder: pathlib.Path, fingerprint: str) -> tuple[Arrays, dict]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["check"] != _digest(meta):
            raise _Unusable("damaged (the checksum of meta.json differs)")
        if meta["fingerprint"] != fingerprint:
            raise _Unusable("stale")
        arrays = {name: _map(folder / f"{name}.bin", m) for name, m in meta["arrays"].items()}
        return arrays, meta["info"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _Unusable(f"damaged ({type(e).__name__}: {e})") from e


def _digest(meta: dict) -> str:
    return values_fingerprint({k: v for k, v in meta.items() if k != "check"})


def _map(path: pathlib.Path, meta: dict) -> np.ndarray:
    dtype = np.dtype(meta["dtype"])
    expected, found = meta["length"] * dtype.itemsize, path.stat().st_size
    if expected != found:
        raise _Unusable(f"damaged ({path.name} has {found} bytes, not {expected})")
    if _checksums(path, len(meta["crc32"])) != _sampled(meta["crc32"]):
        raise _Unusable(f"damaged (the checksum of {path.name} differs)")
    if not meta["length"]:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _sample(num_blocks: int) -> list[int]:
    if num_blocks <= MAX_BLOCKS_CHECKED:
        return list(range(num_blocks))
    return [int(i) for i in np.linspace(0, num_blocks - 1, MAX_BLOCKS_CHECKED)]


def _sampled(checksums: list[int]) -> list[int]:
    return [checksums[i] for i in _sample(len(checksums))]


def _checksums(path: pathlib.Path, num_blocks: int | None) -> list[int]:
    """CRC-32 of the file's blocks: of all when `num_blocks` is None, else of the sampled ones."""
    out = []
    with open(path, "rb") as f:
        if num_blocks is None:
            while block := f.read(BLOCK_BYTES):
                out.append(zlib.crc32(block))
            return out
        for i in _sample(num_blocks):
            f.seek(i * BLOCK_BYTES)
            out.append(zlib.crc32(f.read(BLOCK_BYTES)))
    return out
