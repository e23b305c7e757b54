"""Texts as rows for a trained model, each behind what a document begins with.

A document is cut every S tokens; pieces follow each other in rows, in order, and a piece that does
not fit any more begins the next row. Nothing is shuffled and nothing is cached.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One document and the index of its file."""

    text: str
    source: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRows:
    """A batch of rows. `documents` and `sources` `[N]` are those of its sequences, in row order."""

    tokens: NDArray[np.int32]  # [B, S]
    segment_ids: NDArray[np.int32]  # [B, S]; 0 is padding
    positions: NDArray[np.int32]  # [B, S]
    documents: NDArray[np.int32]
    sources: NDArray[np.int32]


def read_files(paths: Sequence[pathlib.Path]) -> Iterator[Text]:
    """Every file as a document. UserError where one is no UTF-8 text or is empty."""
    for source, path in enumerate(paths):
        text = _read(path)
        if not text:
            raise UserError(f"{path} is empty: name files that hold text")
        yield Text(text=text, source=source)


def read_lines(paths: Sequence[pathlib.Path]) -> Iterator[Text]:
    """Every line as a document; only a newline ends one. UserError for a blank line.

    Line n of a text and line n of its translation then have the same number.
    """
    for source, path in enumerate(paths):
        for number, line in enumerate(_read(path).removesuffix("\n").split("\n"), start=1):
            if not line.strip():
                raise UserError(f"line {number} of {path} is blank: remove it, so that lines pair")
            yield Text(text=line.removesuffix("\r"), source=source)


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; --text takes files") from error


def rows_of_texts(
    texts: Iterable[Text],
    tokenizer: Tokenizer,
    *,
    beginning: Sequence[int],
    batch_size: int,
    sequence_length: int,
) -> Iterator[TextRows]:
    """Batches of B rows of S tokens; the last is filled with padding.

    `beginning` are the ids in front of every document: a run's end token, or what a published
    model's tokenizer puts there.
    """
    rows = _Rows(batch_size, sequence_length)
    for document, text in enumerate(texts):
        ids = np.concatenate([np.array(beginning, np.int32), tokenizer.encode(text.text)])
        for start in range(0, len(ids), sequence_length):
            piece = ids[start : start + sequence_length]
            if not rows.fits(len(piece)):
                yield rows.take()
            rows.add(piece, document, text.source)
    if rows.used:
        yield rows.take()


class _Rows:
    """One batch being filled."""

    def __init__(self, batch_size: int, sequence_length: int):
        self._shape = (batch_size, sequence_length)
        self._clear()

    def _clear(self) -> None:
        self._fields = [np.zeros(self._shape, np.int32) for _ in range(3)]
        self._row = self._at = self._segment = 0
        self._documents: list[int] = []
        self._sources: list[int] = []

    @property
    def used(self) -> bool:
        return bool(self._documents)

    def fits(self, length: int) -> bool:
        """Whether there is room, in this row or in one that follows."""
        return self._at + length <= self._shape[1] or self._row + 1 < self._shape[0]

    def add(self, piece: NDArray, document: int, source: int) -> None:
        if self._at + len(piece) > self._shape[1]:
            self._row, self._at, self._segment = self._row + 1, 0, 0
        where = (self._row, slice(self._at, self._at + len(piece)))
        self._segment += 1
        values = (piece, self._segment, np.arange(len(piece)))
        for field, value in zip(self._fields, values, strict=True):
            field[where] = value
        self._at += len(piece)
        self._documents.append(document)
        self._sources.append(source)

    def take(self) -> TextRows:
        """What was added, and starts anew."""
        tokens, segment_ids, positions = self._fields
        out = TextRows(
            tokens=tokens,
            segment_ids=segment_ids,
            positions=positions,
            documents=np.array(self._documents, np.int32),
            sources=np.array(self._sources, np.int32),
        )
        self._clear()
        return out
