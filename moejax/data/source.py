"""Sources of documents: what `Data.train` may hold.

A source is a frozen dataclass (so it can be a config) with `documents(split)` and
`fingerprint(split)`. The splits are "train" and "eval"; "eval" is the held-out part. Documents
come in a fixed order, and are text, or int32 token arrays where the data is already tokenised, or
pairs and conversations (`dialogue.py`), of which only the responses are scored.

This file holds the protocol and folders of text files; see also `jsonl.py`, `token_arrays.py` and
`chat.py`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import logging
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from moejax.data.errors import DataError
from moejax.data.fingerprint import files_fingerprint, held_out, relative_name

log = logging.getLogger(__name__)

SPLITS = ("train", "eval")


@runtime_checkable
class Source(Protocol):
    """Documents in a fixed order, in two splits."""

    def documents(self, split: str) -> Iterator[str | np.ndarray]:
        """The split's documents: text, or int32 token ids [n] without a separator."""
        ...

    def fingerprint(self, split: str) -> str:
        """Changes exactly when the split's documents may have changed."""
        ...


@runtime_checkable
class OfFiles(Protocol):
    """A source whose documents lie in files, and are held out by the names of these.

    `unit` is what is held out: "file", "line" or "record".
    """

    unit: ClassVar[str]
    holdout_every: int

    def files(self) -> list[tuple[str, pathlib.Path]]:
        """(name, path) of every file, of both splits."""
        ...


def check_split(split: str) -> None:
    """Raises DataError for a split that is neither "train" nor "eval"."""
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}: the splits are 'train' and 'eval'")


def check_holdout(source: object, every: int) -> None:
    """Raises DataError where `every` cannot leave files on both sides of the split."""
    if every < 2:
        name = type(source).__name__
        raise DataError(f"{name}.holdout_every={every} leaves nothing to train on: use 2 or more")


def existing(path: str, *, what: str) -> pathlib.Path:
    """The expanded path; an error that names it when it is not there."""
    out = pathlib.Path(path).expanduser()
    if not out.exists():
        raise DataError(f"{what} {str(out)!r} does not exist: correct the path in the config")
    return out


def files_below(
    root: pathlib.Path, wanted: str, *, exclude: Sequence[str] = ()
) -> list[tuple[str, pathlib.Path]]:
    """(name below `root`, path), sorted, of every file whose name the regex `wanted` matches.

    Links to files are read, those to folders are not followed, with one warning.

    Args:
      exclude: patterns of a shell; files and folders of these names are left out.

    Raises:
      DataError: a folder cannot be read.
    """
    matches = re.compile(wanted).fullmatch
    banned = re.compile("|".join(map(fnmatch.translate, exclude)) or r"(?!)")
    skipped = Skipped(f"links to folders below {str(root)!r}: name them as sources of their own")
    found = []
    for folder, below, names in os.walk(root, onerror=_refuse):
        below[:] = sorted(name for name in below if not banned.match(name))
        for name in below:
            if pathlib.Path(folder, name).is_symlink():
                skipped.add(relative_name(root, pathlib.Path(folder, name)), "a link")
        for path in (pathlib.Path(folder, name) for name in names if not banned.match(name)):
            name = relative_name(root, path)
            if matches(name) and path.is_file():
                found.append((name, path))
    skipped.report()
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DataError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from error


class Skipped:
    """Counts what a source leaves out and says so once per process, naming the first."""

    def __init__(self, what: str):
        self._what, self._count, self._first = what, 0, ""

    def add(self, name: str, reason: str) -> None:
        self._count += 1
        self._first = self._first or f"{name} ({reason})"

    def report(self) -> None:
        if self._count:
            _warn_once(f"skipped {self._count} {self._what}; the first is {self._first}")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """A folder of UTF-8 text files; each file is a document.

    Files are read in the order of their path below the folder. One in `holdout_every`, chosen by
    a hash of that path, is held out. Files that hold NUL bytes, are not UTF-8 or cannot be read
    are skipped with one warning; empty files are not documents.

    Attributes:
      path: the folder (`~` is expanded).
      pattern: which files below it: `*` and `?` within a name, `**/` for any folders.
      holdout_every: the mean distance between held-out files.
      exclude: names of folders and files to leave out wherever they occur below the folder;
        `*` and `?` match as in a shell.
    """

    path: str
    pattern: str = "**/*.py"
    holdout_every: int = 20
    exclude: tuple[str, ...] = ("__pycache__", ".git", ".venv", "node_modules")

    unit: ClassVar[str] = "file"

    def documents(self, split: str) -> Iterator[str]:
        skipped = Skipped(f"files in {self.path!r} that are not UTF-8 text")
        count = 0
        for name, path in self._split(split):
            text = _read_text(name, path, skipped)
            if text:
                count += 1
                yield text
        skipped.report()
        if not count:
            raise DataError(
                f"the {split} split of folder {self.path!r} holds no readable text: "
                f"check what {self.pattern!r} matches there"
            )

    def fingerprint(self, split: str) -> str:
        return files_fingerprint(self._root, [path for _, path in self._split(split)])

    @property
    def _root(self) -> pathlib.Path:
        root = existing(self.path, what="data folder")
        if not root.is_dir():
            raise DataError(
                f"TextFiles.path {str(root)!r} is a file: give the folder that holds it"
            )
        return root

    def _split(self, split: str) -> list[tuple[str, pathlib.Path]]:
        """(relative name, path) of the split's files, sorted by name."""
        check_split(split)
        check_holdout(self, self.holdout_every)
        files = self.files()
        chosen = held_out([name for name, _ in files], self.holdout_every) == (split == "eval")
        out = [file for file, keep in zip(files, chosen, strict=True) if keep]
        if not out:
            raise DataError(
                f"folder {self.path!r} holds {len(files)} file that matches {self.pattern!r}: "
                "at least two are needed, one to train on and one to hold out"
            )
        return out

    def files(self) -> list[tuple[str, pathlib.Path]]:
        root = self._root
        found = files_below(root, _pattern_regex(self.pattern), exclude=self.exclude)
        if not found:
            raise DataError(
                f"folder {str(root)!r} holds no file that matches {self.pattern!r}: "
                "correct the path or the pattern"
            )
        return found


def _pattern_regex(pattern: str) -> str:
    """A regular expression for a glob pattern in which `**/` is any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(special.get(part, re.escape(part)) for part in parts)


def _read_text(name: str, path: pathlib.Path, skipped: Skipped) -> str:
    """The file's text with its line ends untouched; empty where it is skipped."""
    try:
        raw = path.read_bytes()
        if b"\0" in raw:
            skipped.add(name, "NUL bytes")
            return ""
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        skipped.add(name, f"byte {e.start} is not UTF-8")
    except OSError as e:
        skipped.add(name, e.strerror or type(e).__name__)
    return ""


def python_stdlib(*, pattern: str = "**/*.py", holdout_every: int = 20) -> TextFiles:
    """The sources of the running Python's standard library: about 12 MB, there on any machine.

    Leaves out tests (mostly generated tables), installed packages, and build files, which hold
    paths of the machine that built this Python.
    """
    return TextFiles(
        path=sysconfig.get_paths()["stdlib"],
        pattern=pattern,
        holdout_every=holdout_every,
        exclude=(
            *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
            *("_sysconfigdata*", "config-*"),
        ),
    )


def package_readmes(*, pattern: str = "*.dist-info/METADATA", holdout_every: int = 8) -> TextFiles:
    """What the installed Python packages say about themselves: about 1 MB of English prose."""
    return TextFiles(
        path=sysconfig.get_paths()["purelib"],
        pattern=pattern,
        holdout_every=holdout_every,
    )
