"""ArrayRecord files of documents that are already tokenised.

Layout: a folder with `token_arrays.json` and any number of `*.array_record` files. Each record
is one document: its token ids as little-endian int32, without a separator. The JSON file
holds `format`, `vocab_size` and, if known, `tokenizer`: the fingerprint of the tokenizer that
made the ids, so that data and tokenizer cannot be mismatched without an error.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moejax.data.errors import DataError
from moejax.data.fingerprint import files_fingerprint, fingerprint, held_out
from moejax.data.source import check_holdout, check_split, existing, files_below

FORMAT = "moejax-token-arrays-1"
_MANIFEST = "token_arrays.json"
_READ_RECORDS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenArrays:
    """Documents as int32 token ids [n], from a folder written by `write_token_arrays`.

    One record in `holdout_every`, chosen by a hash of file name and record number, is held out.

    Attributes:
      path: the folder.
      holdout_every: the mean distance between held-out records.
    """

    path: str
    holdout_every: int = 20

    unit: ClassVar[str] = "record"

    def documents(self, split: str) -> Iterator[np.ndarray]:
        check_split(split)
        check_holdout(self, self.holdout_every)
        files = [(name, path, _num_records(path)) for name, path in self.files()]
        held = held_out([f"{n}:{i}" for n, _, c in files for i in range(c)], self.holdout_every)
        count = start = 0
        for _, path, num in files:
            chosen = np.flatnonzero(held[start : start + num] == (split == "eval"))
            start += num
            for document in _read(path, chosen):
                if document.size:
                    count += 1
                    yield document
        if not count:
            raise DataError(f"the {split} split of {self.path!r} holds no tokens: add documents")

    def fingerprint(self, split: str) -> str:
        check_split(split)
        root = self._root
        files = files_fingerprint(root, [root / _MANIFEST, *(p for _, p in self.files())])
        return fingerprint(files, self.holdout_every, split)

    def manifest(self) -> dict:
        """What `token_arrays.json` says: `format`, `vocab_size`, `tokenizer`."""
        path = self._root / _MANIFEST
        try:
            manifest = json.loads(path.read_text("utf-8"))
            vocab_size, form = int(manifest["vocab_size"]), manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{str(path)!r} cannot be read ({e!r}): write the folder with write_token_arrays"
            ) from e
        if form != FORMAT:
            raise DataError(f"{str(path)!r} has format {form!r}, this version reads {FORMAT!r}")
        return {**manifest, "vocab_size": vocab_size}

    @property
    def _root(self) -> pathlib.Path:
        root = existing(self.path, what="TokenArrays folder")
        if not root.is_dir():
            raise DataError(f"TokenArrays.path {str(root)!r} is a file: give the folder around it")
        return root

    def files(self) -> list[tuple[str, pathlib.Path]]:
        root = self._root
        found = files_below(root, r".*\.array_record")
        if not found:
            raise DataError(f"folder {str(root)!r} holds no *.array_record file")
        return found


def write_token_arrays(
    path: str,
    documents: Iterable[np.ndarray],
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    records_per_file: int = 65536,
) -> int:
    """Writes documents for `TokenArrays` to read, and returns their number.

    Args:
      path: the folder; made if missing, must hold no ArrayRecord files yet.
      documents: token ids [n] each, any integer dtype, all in [0, vocab_size).
      vocab_size: of the tokenizer that made them.
      tokenizer: that tokenizer's `fingerprint()`.
      records_per_file: how many documents go into one file.
    """
    root = pathlib.Path(path).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    if any(root.glob("*.array_record")):
        raise DataError(f"folder {str(root)!r} already holds ArrayRecord files: give a new folder")
    writer, count = None, 0
    try:
        for document in documents:
            if count % records_per_file == 0:
                if writer is not None:
                    writer.close()
                name = root / f"part-{count // records_per_file:05d}.array_record"
                writer = ArrayRecordWriter(str(name), "group_size:1")
            writer.write(_to_bytes(document, count, vocab_size))
            count += 1
    finally:
        if writer is not None:
            writer.close()
    manifest = {"format": FORMAT, "vocab_size": vocab_size, "tokenizer": tokenizer}
    (root / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return count


def _to_bytes(document: np.ndarray, number: int, vocab_size: int) -> bytes:
    ids = np.asarray(document)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"document {number} is {ids.dtype} {ids.shape}: give integers of shape [n]")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise DataError(f"document {number} holds token ids outside [0, {vocab_size})")
    return ids.astype("<i4").tobytes()


def _num_records(path: pathlib.Path) -> int:
    reader = _open(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


def _open(path: pathlib.Path) -> ArrayRecordReader:
    try:
        reader = ArrayRecordReader(str(path))
    except (RuntimeError, ValueError, OSError) as e:
        raise DataError(f"{str(path)!r} is not a readable ArrayRecord file: {e}") from e
    if not reader.ok():
        raise DataError(f"{str(path)!r} is not a readable ArrayRecord file: write it again")
    return reader


def _read(path: pathlib.Path, numbers: np.ndarray) -> Iterator[np.ndarray]:
    reader = _open(path)
    try:
        for start in range(0, len(numbers), _READ_RECORDS):
            for record in reader.read([int(i) for i in numbers[start : start + _READ_RECORDS]]):
                yield np.frombuffer(record, dtype="<i4").astype(np.int32)
    except (RuntimeError, ValueError, IndexError) as e:
        raise DataError(f"{str(path)!r} is damaged: {e}") from e
    finally:
        reader.close()
