"""Routing traces as one file: written batch by batch, read batch by batch, checked on the way.

The file is a ZIP archive of `.npy` arrays, one folder per batch (`00000000/experts.npy`), and
`trace.json` with what is the same for all; `numpy.load` opens it too. ZIP keeps a CRC-32 of every
member and its directory at the end, so that damage and truncation are noticed. Nothing in it is a
pickle. The same trace gives the same bytes: no times are stored.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moejax.analysis.trace import TraceBatch, TraceInfo
from moejax.errors import UserError

FORMAT = "moejax-trace-1"
_HEADER = "trace.json"
_LEVEL = 4  # of compression: ids shrink, float16 hardly does
_MOST_HEADER_BYTES = 2**26
_ARRAYS = tuple(field.name for field in dataclasses.fields(TraceBatch))
_PROBS = "probs"
# What zipfile and numpy raise where bytes are not as written.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, OSError)


class TraceWriter:
    """Writes a trace; use it in a `with`, and call `add` for every batch.

    One batch is in memory at a time. The file appears whole at the end: where the block raises, no
    file is left, and what was at `path` before stays.
    """

    def __init__(self, path: str | os.PathLike, info: TraceInfo):
        self._path, self._info = pathlib.Path(path), info
        self._partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._batches = self.num_tokens = self.num_sequences = self.num_documents = 0
        self._names: tuple[str, ...] | None = None

    def __enter__(self) -> TraceWriter:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self._partial, "w")
        except OSError as error:
            raise UserError(
                f"cannot write the trace {self._path}: {error.strerror}; name another with --output"
            ) from error
        return self

    def add(self, batch: TraceBatch) -> None:
        """Appends a batch; one without tokens is left out."""
        if not len(batch.tokens):
            return
        arrays = {name: getattr(batch, name) for name in _ARRAYS}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        names = tuple(arrays)
        if self._names not in (None, names):
            raise ValueError(f"this trace holds {self._names}, and the batch {names}")
        _check_batch(arrays, self._info)
        self._names = names
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            self._write(_member(self._batches, name), data.getvalue())
        self._batches += 1
        self.num_tokens += len(batch.tokens)
        self.num_sequences += len(batch.lengths)
        self.num_documents = int(batch.documents[-1]) + 1

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self._write(_HEADER, json.dumps(self._header(), indent=1).encode())
            self._zip.close()
            if kind is None:
                os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        totals = {
            "num_batches": self._batches,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
            "num_documents": self.num_documents,
            "arrays": self._names or (),
        }
        return {"format": FORMAT, "info": dataclasses.asdict(self._info), "totals": totals}

    def _write(self, name: str, data: bytes) -> None:
        member = zipfile.ZipInfo(name)  # dated 1980, always
        member.compress_type = zipfile.ZIP_DEFLATED
        self._zip.writestr(member, data, compresslevel=_LEVEL)


class TraceFile:
    """A trace on disk. Opening reads what it says about itself, `batches` the rest.

    Attributes:
      path: of the file.
      info: what is the same for the whole trace.
      num_tokens, num_sequences, num_documents: totals; documents are numbered below theirs.

    Raises:
      UserError: there is no such file, it is no trace, of another version, empty or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        try:
            with zipfile.ZipFile(self.path) as file:
                content = _header_of(self.path, file)
                members = set(file.namelist())
        except OSError as error:
            raise UserError(f"cannot read the trace {self.path}: {error.strerror}") from error
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{self.path} is no trace, or was cut off: write it with `moejax trace`"
            ) from error
        try:
            self.info = _info(content["info"])
            totals = content["totals"]
            self.num_tokens = int(totals["num_tokens"])
            self.num_sequences = int(totals["num_sequences"])
            self.num_documents = int(totals["num_documents"])
            self._num_batches = int(totals["num_batches"])
            self._names = tuple(totals["arrays"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path, f"{_HEADER} lacks {error}") from error
        wanted = {_member(n, name) for n in range(self._num_batches) for name in self._names}
        if missing := sorted(wanted - members):
            raise _damaged(self.path, f"{missing[0]} is missing")
        if not self.num_tokens:
            raise UserError(f"{self.path} holds no token: trace more text")

    @property
    def has_probs(self) -> bool:
        """Whether the probabilities of every token are in it, and not only their means."""
        return _PROBS in self._names

    def batches(self) -> Iterator[TraceBatch]:
        """The batches in order, one in memory at a time.

        Raises UserError where one is damaged, or where all together are not what the file says.
        """
        num_tokens = num_sequences = 0
        with zipfile.ZipFile(self.path) as file:
            for number in range(self._num_batches):
                arrays = {n: self._array(file, _member(number, n)) for n in self._names}
                try:
                    _check_batch(arrays, self.info)
                    batch = TraceBatch(**arrays)
                    _check_documents(batch.documents, self.num_documents)
                except (TypeError, ValueError, KeyError) as error:
                    raise _damaged(self.path, f"batch {number}: {error}") from error
                num_tokens += len(batch.tokens)
                num_sequences += len(batch.lengths)
                yield batch
        if (num_tokens, num_sequences) != (self.num_tokens, self.num_sequences):
            raise _damaged(self.path, f"it holds {num_tokens} of {self.num_tokens} tokens")

    def _array(self, file: zipfile.ZipFile, name: str) -> NDArray:
        try:
            data = io.BytesIO(file.read(name))
            return np.lib.format.read_array(data, allow_pickle=False)
        except _DAMAGE as error:
            raise _damaged(self.path, f"{name}: {error}") from error


def _member(number: int, name: str) -> str:
    return f"{number:08d}/{name}.npy"


def _header_of(path: pathlib.Path, file: zipfile.ZipFile) -> dict[str, Any]:
    foreign = UserError(f"{path} is an archive but no trace: write one with `moejax trace`")
    try:
        if file.getinfo(_HEADER).file_size > _MOST_HEADER_BYTES:
            raise foreign
        content = json.loads(file.read(_HEADER))
        form = content["format"]
    except (KeyError, TypeError) as error:  # no such member, or no such field
        raise foreign from error
    except _DAMAGE as error:
        raise _damaged(path, f"{_HEADER}: {error}") from error
    if form != FORMAT:
        raise UserError(f"{path} has format {form!r}, and this version of moejax reads {FORMAT!r}")
    return content


def _info(values: dict[str, Any]) -> TraceInfo:
    tuples = {name: tuple(values[name]) for name in ("layers", "sources")}
    return TraceInfo(**(values | tuples))


def _check_batch(arrays: dict[str, NDArray], info: TraceInfo) -> None:
    """Raises ValueError where shapes, dtypes or ids do not fit together."""
    size, tokens = len(arrays["lengths"]), len(arrays["tokens"])
    own = (len(info.layers), tokens)
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (tokens,),
        **dict.fromkeys(("lengths", "documents", "sources"), (size,)),
        "experts": (*own, info.k),
        "weights": (*own, info.k),
        "sequence_probs": (len(info.layers), size, info.num_experts),
        "sequence_entropy": (len(info.layers), size),
        _PROBS: (*own, info.num_experts),
    }
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise ValueError(f"{name} is {list(array.shape)}, not {list(shapes[name])}")
    if arrays["lengths"].min(initial=1) < 1 or arrays["lengths"].sum() != tokens:
        raise ValueError(f"lengths do not sum to {tokens} tokens")
    experts = arrays["experts"]
    if experts.dtype != info.expert_dtype or experts.max(initial=0) > info.num_experts:
        raise ValueError(f"experts are not {info.expert_dtype} up to {info.num_experts}")
    if not 0 <= arrays["sources"].min(initial=0) <= arrays["sources"].max() < len(info.sources):
        raise ValueError(f"sources are not indices of {len(info.sources)}")


def _check_documents(documents: NDArray, num_documents: int) -> None:
    if documents[0] < 0 or documents[-1] >= num_documents or (np.diff(documents) < 0).any():
        raise ValueError(f"documents are not numbered in order below {num_documents}")


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(f"the trace {path} is damaged ({why}): write it again with `moejax trace`")
