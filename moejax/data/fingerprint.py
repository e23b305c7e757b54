"""Fingerprints of values and files, and the choice of the held-out documents.

A fingerprint is a short hexadecimal string. Equal content gives the same fingerprint on every
machine and in every process, so it may name a cache entry and be stored in a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WHOLE_FILE_BYTES = 64 * 2**20  # larger files are hashed by samples, so that start-up stays fast
_SAMPLE_BYTES = 64 * 2**10
_NUM_SAMPLES = 256


def fingerprint(*values: Any) -> str:
    """32 hexadecimal digits for a sequence of JSON-able values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_fingerprint(path: str | os.PathLike) -> str:
    """A fingerprint of a file's size and content.

    Up to `WHOLE_FILE_BYTES` every byte counts. Beyond that 256 evenly spaced blocks of 64 KiB
    and the modification time count: a copy of a large file is then a new file, which costs one
    tokenisation. What goes unnoticed is a change between the blocks that keeps size and time.
    """
    stat = os.stat(path)
    digest = hashlib.blake2b(str(stat.st_size).encode(), digest_size=16)
    with open(path, "rb") as f:
        if stat.st_size <= WHOLE_FILE_BYTES:
            digest.update(f.read())
        else:
            digest.update(str(stat.st_mtime_ns).encode())
            for start in np.linspace(0, stat.st_size - _SAMPLE_BYTES, _NUM_SAMPLES).astype(int):
                f.seek(int(start))
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def files_fingerprint(root: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """A fingerprint of names (relative to `root`), sizes and contents; `root` does not matter."""
    rows = []
    for path in files:
        try:
            rows.append([relative_name(root, path), file_fingerprint(path)])
        except OSError as e:  # the source skips such a file too, with a warning
            rows.append([relative_name(root, path), f"unreadable: {type(e).__name__}"])
    return fingerprint(rows)


def relative_name(root: pathlib.Path, path: pathlib.Path) -> str:
    """The path below `root` with forward slashes; the file's own name when `root` is the file."""
    return path.name if path == root else path.relative_to(root).as_posix()


def name_hash(name: str) -> int:
    """A stable 64-bit hash of a name."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    )


def held_out(names: Sequence[str], every: int) -> np.ndarray:
    """Which documents are held out: one in `every`, chosen by a hash of the document's name.

    The choice for one name does not depend on the other names, their order or the machine, so
    adding files never moves a document from one split to the other. Only when the hash selects
    none of at least two documents is the one with the smallest hash held out.

    Args:
      names: one stable name per document.
      every: the mean distance between held-out documents; at least 2.

    Returns:
      bool [len(names)], True for held-out documents.
    """
    hashes = np.array([name_hash(n) for n in names], dtype=np.uint64)
    out = hashes % np.uint64(every) == 0
    if len(names) >= 2 and not out.any():
        out[hashes.argmin()] = True
    if len(names) >= 2 and out.all():
        out[hashes.argmax()] = False
    return out
