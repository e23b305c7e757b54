"""JSON Lines: one JSON object per line, one of its fields is the document."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import ClassVar

from moejax.data.errors import DataError
from moejax.data.fingerprint import files_fingerprint, fingerprint, held_out
from moejax.data.source import Skipped, check_holdout, check_split, existing, files_below


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Text documents from `.jsonl` files (or `.jsonl.gz`).

    One line in `holdout_every`, chosen by a hash of file name and line number, is held out.
    Lines that are not an object with a text in `field` are skipped with one warning; blank lines
    and empty texts are not documents.

    Attributes:
      path: a file, or a folder whose `*.jsonl` and `*.jsonl.gz` files are read in sorted order.
      field: the name of the field that holds the text.
      holdout_every: the mean distance between held-out lines.
    """

    path: str
    field: str = "text"
    holdout_every: int = 20

    unit: ClassVar[str] = "line"

    def documents(self, split: str) -> Iterator[str]:
        check_split(split)
        check_holdout(self, self.holdout_every)
        skipped = Skipped(f"lines in {self.path!r} without a text in field {self.field!r}")
        count = 0
        for where, line in lines_of(self.path, split, self.holdout_every):
            text = self._text(where, line, skipped)
            if text:
                count += 1
                yield text
        skipped.report()
        if not count:
            raise DataError(
                f"the {split} split of {self.path!r} holds no line with a text in field "
                f"{self.field!r}: set `field` to the name the file uses"
            )

    def fingerprint(self, split: str) -> str:
        check_split(split)
        return fingerprint(content_fingerprint(self.path), self.field, self.holdout_every, split)

    def files(self) -> list[tuple[str, pathlib.Path]]:
        return files_of(self.path)

    def _text(self, where: str, line: bytes, skipped: Skipped) -> str:
        try:
            record = json.loads(line)
        except ValueError:  # covers bad JSON and bytes that are not UTF-8
            skipped.add(where, "not JSON")
            return ""
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(map(repr, record)) if isinstance(record, dict) else "none"
            skipped.add(where, f"its fields: {fields}")
            return ""
        return valid(text)


def valid(text: str) -> str:
    """The text without what UTF-8 cannot hold: a lone surrogate is JSON but not text."""
    return text.encode("utf-8", "replace").decode()


def lines_of(path: str, split: str, holdout_every: int) -> Iterator[tuple[str, bytes]]:
    """("file:line", line) of every line of a split that is not blank, in order.

    One line in `holdout_every`, chosen by a hash of file name and line number, is held out.
    """
    files = files_of(path)
    names = [f"{name}:{number}" for name, file in files for number, _ in _lines(file)]
    chosen = held_out(names, holdout_every) == (split == "eval")
    lines = (line for _, file in files for _, line in _lines(file))
    for where, line, keep in zip(names, lines, chosen, strict=True):
        if keep:
            yield where, line


def content_fingerprint(path: str) -> str:
    """Changes when a name or the content of one of the files does."""
    return files_fingerprint(_root(path), [file for _, file in files_of(path)])


def _root(path: str) -> pathlib.Path:
    return existing(path, what="JSON Lines file or folder")


def files_of(path: str) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of the file, or of those in the folder, in order.

    Raises DataError where there are none, or one is there with and without compression.
    """
    root = _root(path)
    if root.is_file():
        return [(root.name, root)]
    found = files_below(root, r".*\.jsonl(\.gz)?")
    if not found:
        raise DataError(f"folder {str(root)!r} holds no *.jsonl file: correct the path")
    names = {name for name, _ in found}
    twice = sorted(name for name in names if f"{name}.gz" in names)
    if twice:
        raise DataError(
            f"folder {str(root)!r} holds {twice[0]} and {twice[0]}.gz, the same lines twice: "
            "move one of them away"
        )
    return found


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line that is not blank."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as e:
        raise DataError(f"cannot read {str(path)!r}: {e}") from e
