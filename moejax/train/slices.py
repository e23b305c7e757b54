"""Checkpoints of weights, written and read slice by slice through TensorStore.

For weights that do not fit into host memory: the arrays are in the layout of Orbax (a zarr array
for each leaf in one OCDBT store), so that `Checkpointer` reads what `write_checkpoint` wrote, and
`CheckpointSlices` what either wrote. Fingerprints are added up from slices on the way.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from moejax.errors import UserError
from moejax.train.fingerprint import digits, run_words
from moejax.train.manifest import Leaf, Manifest, versions

STATE, MANIFEST = "state", "manifest/manifest.json"
Index = tuple[int, ...]  # along the first axes

_SLICE_BYTES = 32 * 2**20
_NUM_THREADS = 3  # each makes one slice; some wait for the disk while others compute
_IN_FLIGHT_BYTES = 256 * 2**20  # of slices that are made and not yet written
_FILE_BYTES = 256 * 2**20  # of one file of the store
_UNFINISHED = ".__lock"  # how TensorStore ends the name of a file that it is writing


@runtime_checkable
class SourceLeaf(Protocol):
    """An array that is read in slices, which nobody changes after they were read."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Index) -> np.ndarray: ...


def write_checkpoint(
    directory: pathlib.Path, leaves: Iterable[SourceLeaf], *, step: int, extra: dict[str, Any]
) -> int:
    """A checkpoint of `leaves` in the new folder `directory`, as `Checkpointer.save` writes one.

    Returns the number of bytes. In memory are `_IN_FLIGHT_BYTES` that are not yet written, and a
    slice of at most `_SLICE_BYTES` for each thread; a leaf without layers or experts is one slice,
    whatever its size.
    """
    # Files reach the disk in a thread of their own, and not each before the next write.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    described: dict[str, Leaf] = {}
    with (
        _Writes(_IN_FLIGHT_BYTES) as writes,
        _Flushing(directory) as flushing,
        futures.ThreadPoolExecutor(_NUM_THREADS) as threads,
    ):
        for leaf in leaves:
            depth = _depth(leaf)
            array = _open(directory / STATE, leaf.path, context, create=_zarr(leaf, depth))
            write = functools.partial(_write_slice, leaf, array, writes)
            words = np.zeros(2, np.uint32)
            for added in threads.map(write, np.ndindex(leaf.shape[:depth])):
                words += added
                flushing.count(math.prod(leaf.shape[depth:]) * leaf.dtype.itemsize)
            writes.wait()
            described[leaf.path] = Leaf(
                shape=leaf.shape, dtype=str(leaf.dtype), fingerprint=digits(words)
            )
    (directory / STATE / "_METADATA").write_text(json.dumps(_orbax_metadata(described)))
    manifest = Manifest(step=step, leaves=described, extra=extra, versions=versions())
    path = directory / MANIFEST
    path.parent.mkdir()
    path.write_text(json.dumps(manifest.to_json()))
    _to_disk(_files(directory))
    sizes = (math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in described.values())
    return sum(sizes)


class StoredSlices:
    """A leaf of a checkpoint; `stored[index]` reads that slice of it.

    What is read adds up to a fingerprint, which `check` compares once all of it was read.
    """

    def __init__(self, directory: pathlib.Path, path: str, leaf: Leaf):
        self.path, self.shape = path, leaf.shape
        self.dtype = np.dtype(jnp.dtype(leaf.dtype))
        self._fingerprint = leaf.fingerprint
        self._array = _open(directory / STATE, path, ts.Context())
        self._words, self._seen = np.zeros(2, np.uint32), 0

    def __getitem__(self, index: Index) -> np.ndarray:
        values = self._array[index].read().result()
        self._words += _words(values, index, self.shape)
        self._seen += values.size
        return values

    def check(self) -> None:
        """Raises UserError unless every element was read once and is what was saved."""
        if self._seen != math.prod(self.shape):
            raise ValueError(f"{self.path}: {self._seen} elements were read, of {self.shape}")
        if digits(self._words) != self._fingerprint:
            raise UserError(f"the leaf {self.path} is not what was saved: restore it from a copy")


def _words(values: np.ndarray, index: Index, shape: tuple[int, ...]) -> np.ndarray:
    """What `whole[index]` adds to the fingerprint of `whole`, which has `shape`."""
    row = int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0
    return run_words(values, row * math.prod(shape[len(index) :]))


class _Writes:
    """Writes that go on while slices are made, of so many bytes at a time.

    One commit of the store takes all that has come since the last, so whoever waited for its own
    slice would leave the processor idle. At the end of the `with` nothing goes on any more, also
    after an error: whoever then removes the folder finds all that there is.
    """

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def __enter__(self) -> _Writes:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes)

    def start(self, array: Any, values: np.ndarray) -> None:
        """Writes `values` to all of `array`, of TensorStore; nobody may change them any more.

        Waits first while too much is going on; raises the error of an earlier write.
        """
        with self._changed:
            fits = lambda: not self._bytes or self._bytes + values.nbytes <= self._limit
            self._changed.wait_for(lambda: self._error or fits())
            if self._error:
                raise self._error
            self._bytes += values.nbytes
        try:
            written = array.write(values, can_reference_source_data_indefinitely=True)
        except BaseException as error:
            self._end(values.nbytes, error)
            raise
        num_bytes = values.nbytes  # the callback must not hold the values
        written.add_done_callback(lambda done: self._end(num_bytes, done.exception()))

    def wait(self) -> None:
        """Until all that was started is written; raises the first error."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes)
            if self._error:
                raise self._error

    def _end(self, num_bytes: int, error: BaseException | None) -> None:
        with self._changed:
            self._bytes -= num_bytes
            self._error = self._error or error
            self._changed.notify_all()


def _write_slice(
    leaf: SourceLeaf, array: ts.TensorStore, writes: _Writes, index: Index
) -> np.ndarray:
    """Starts to write `leaf[index]`; returns what it adds to the words of the fingerprint."""
    values = leaf[index]
    writes.start(array[index], values)
    return _words(values, index, leaf.shape)


class _Flushing:
    """Brings the finished files of `directory` to the disk while the next ones are written.

    The last of them, and the manifest, are left for the end. A disk's error is raised here: a file
    that is opened after one was told of it would be told nothing.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory, self._flushed = directory, set[pathlib.Path]()
        self._thread, self._going = futures.ThreadPoolExecutor(1), futures.Future[None]()
        self._going.set_result(None)
        self._bytes = 0

    def __enter__(self) -> _Flushing:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if error is None:
            self._going.result()

    def count(self, num_bytes: int) -> None:
        """So many bytes more were made."""
        self._bytes += num_bytes
        if self._bytes >= _FILE_BYTES and self._going.done():
            self._going.result()
            self._going, self._bytes = self._thread.submit(self._flush), 0

    def _flush(self) -> None:
        found = _files(self._directory) - self._flushed
        finished = {path for path in found if not path.name.endswith(_UNFINISHED)}
        _to_disk(finished)
        self._flushed |= finished


def _files(directory: pathlib.Path) -> set[pathlib.Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def _to_disk(paths: Iterable[pathlib.Path]) -> None:
    """Files reach the disk and leave the page cache.

    What is written once need not push out what is in use, and a machine that gives free memory
    back to its host writes into pages that it had just now several times as fast as into others.
    """
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _depth(leaf: SourceLeaf) -> int:
    """How many axes to take apart: layers, and experts too where a layer is too large."""
    size, depth = math.prod(leaf.shape) * leaf.dtype.itemsize, 0
    while size > _SLICE_BYTES and len(leaf.shape) - depth > 2:
        size //= max(leaf.shape[depth], 1)
        depth += 1
    return depth


def _zarr(leaf: SourceLeaf, depth: int) -> dict[str, Any]:
    return {
        "shape": list(leaf.shape),
        "chunks": [1] * depth + [max(size, 1) for size in leaf.shape[depth:]],
        "dtype": "bfloat16" if leaf.dtype == jnp.bfloat16 else leaf.dtype.str,
        "compressor": None,
        "dimension_separator": ".",
    }


def _open(state: pathlib.Path, path: str, context: ts.Context, create: dict | None = None):
    store = {
        "driver": "ocdbt",
        "base": f"file://{state}/",
        "path": f"{path}/",
        "config": {"max_inline_value_bytes": 1024},
        "target_data_file_size": _FILE_BYTES,
    }
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": store,
        "store_data_equal_to_fill_value": True,
    }
    if create is None:
        return ts.open(spec, read=True, context=context).result()
    return ts.open(spec | {"metadata": create}, create=True, context=context).result()


def _orbax_metadata(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """What Orbax stores beside the arrays: the tree that they are the leaves of."""
    return {
        "tree_metadata": {
            str((path,)): {
                "key_metadata": [{"key": path, "key_type": 2}],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(leaf.shape),
                },
            }
            for path, leaf in leaves.items()
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
