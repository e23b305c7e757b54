"""Packing documents into rows of fixed length, once, into an index on disk.

A row is a list of *pieces*: runs of predictions of one document (see `documents.py`). Every
prediction of every document is in exactly one piece. The index depends only on the documents,
the packing, the row length and the seed, and any row can be made at any time.

Dialogues are never cut in two: a response without its prompt is another task. What of one goes
beyond a row is left out, and so is one of which no scored token is left; both are reported.
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
import logging
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np

from moejax.data.cache import ArrayWriter, open_or_build
from moejax.data.documents import Documents
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint
from moejax.data.rows import Rows
from moejax.data.shuffle import order

log = logging.getLogger(__name__)

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Runs of documents, grouped by row; runs of one row are adjacent and in row order.

    Attributes:
      row: int64 [num pieces], non-decreasing, every row from 0 on.
      document: int64 [num pieces].
      start: int64 [num pieces], the first prediction, counted within the document.
      length: int64 [num pieces], at least 1.
    """

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


@runtime_checkable
class Packing(Protocol):
    """How documents are laid into rows."""

    def pack(self, lengths: np.ndarray, seq_len: int) -> Pieces:
        """Assigns predictions to rows.

        Args:
          lengths: int64 [num documents], predictions per document, at least 1 each.
          seq_len: S, predictions per row.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcatChunk:
    """Joins all documents and cuts every S tokens: no padding but in the last row.

    A document that crosses a cut goes on in the next row without its earlier context.
    """

    def pack(self, lengths: np.ndarray, seq_len: int) -> Pieces:
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        cuts = np.union1d(np.arange(0, total, seq_len), np.append(ends, 0))
        begin = cuts[:-1]
        document = np.searchsorted(ends, begin, side="right")
        return Pieces(
            row=begin // seq_len,
            document=document,
            start=begin - (ends - lengths)[document],
            length=np.diff(cuts),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFit:
    """Best-fit decreasing: a document that fits in a row is never cut, and pads what is left.

    Longer documents are cut every S tokens and their last piece is packed like a document. Ding
    et al., "Fewer Truncations Improve Language Modeling", 2024.
    """

    def pack(self, lengths: np.ndarray, seq_len: int) -> Pieces:
        num_pieces = -(-lengths // seq_len)
        document = np.repeat(np.arange(len(lengths)), num_pieces)
        first = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        start = (np.arange(len(document)) - first) * seq_len
        length = np.minimum(lengths[document] - start, seq_len)
        row = best_fit_bins(length, seq_len)
        # Rows in the order of their first document, so that an unshuffled pass follows the source.
        _, first_piece, row = np.unique(row, return_index=True, return_inverse=True)
        rank = np.empty_like(first_piece)
        rank[np.argsort(first_piece)] = np.arange(len(first_piece))
        row = rank[row]
        by_row = np.argsort(row, kind="stable")
        return Pieces(
            row=row[by_row],
            document=document[by_row],
            start=start[by_row],
            length=length[by_row],
        )


def best_fit_bins(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: each item, from large to small, into the fullest bin it fits.

    Items of equal size are placed together: the fullest bin that fits one stays the fullest
    until it is too full, so a bin takes as many as fit before the next bin takes any. The number
    of steps depends on the number of different sizes, not of items.

    Args:
      sizes: integers [n] in [1, capacity].
      capacity: of every bin.

    Returns:
      int64 [n], the bin of each item.
    """
    by_size = np.argsort(-sizes, kind="stable")
    ordered = sizes[by_size]
    bins = np.empty(len(sizes), np.int64)
    room = _Room(capacity)
    edges = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(sizes)]
    for begin, end in zip(edges, edges[1:], strict=False):
        size = int(ordered[begin]) if begin < end else 0
        while begin < end:
            space, available = room.take(size, end - begin)
            each = space // size
            used = available[: -(-(end - begin) // each)]
            count = min(end - begin, each * len(used))
            bins[by_size[begin : begin + count]] = np.repeat(used, each)[:count]
            in_last = count - each * (len(used) - 1)
            room.put(space, available[len(used) :])
            room.put(space - each * size, used[:-1])
            room.put(space - in_last * size, used[-1:])
            begin += count
    return bins


class _Room:
    """Bins by the space they have left."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._num_bins = 0
        self._spaces: list[int] = []  # sorted
        self._bins: dict[int, list[np.ndarray]] = {}

    def take(self, size: int, count: int) -> tuple[int, np.ndarray]:
        """(space, bins) with the least space for `size`; new bins for `count` items if none."""
        at = bisect.bisect_left(self._spaces, size)
        if at == len(self._spaces):
            num_new = -(-count // (self._capacity // size))
            self._num_bins += num_new
            return self._capacity, np.arange(self._num_bins - num_new, self._num_bins)
        space = self._spaces[at]
        bins = self._bins[space].pop()
        if not self._bins[space]:
            del self._bins[space]
            del self._spaces[at]
        return space, bins

    def put(self, space: int, bins: np.ndarray) -> None:
        if space and len(bins):
            if space not in self._bins:
                bisect.insort(self._spaces, space)
                self._bins[space] = []
            self._bins[space].append(bins)


def packed(
    documents: Documents,
    packing: Packing,
    *,
    seq_len: int,
    seed: int | None,
    cache_dir: str,
) -> Rows:
    """The rows of `documents`, from the index in the cache folder or computed now.

    Args:
      documents: one split of one source.
      packing: `ConcatChunk()` or `BestFit()`.
      seq_len: S, tokens per row.
      seed: shuffles the documents before packing; None keeps the source's order.
      cache_dir: where the index is kept.
    """
    config = [_identity(type(packing)), dataclasses.asdict(packing)]
    key = fingerprint("rows", FORMAT, documents.fingerprint, config, seq_len, seed)
    arrays, info = open_or_build(
        pathlib.Path(cache_dir) / "rows" / key,
        key,
        lambda writer: _index(documents, packing, seq_len, seed, writer),
        what=f"the row index for length {seq_len}",
    )
    if info.get("num_cut"):
        log.warning(
            "of %d records %d are longer than a row of %d tokens and were cut there; %d of them "
            "were left out, because nothing of a response was left",
            *(len(documents.offsets) - 1, info["num_cut"], seq_len, info["num_left_out"]),
        )
    return Rows(
        documents=documents,
        seq_len=seq_len,
        fingerprint=key,
        num_scored=info.get("num_scored", documents.num_predictions),
        **arrays,
    )


def _identity(packing: type) -> str:
    """Its name; of the user's own class its text too, for another text may pack in another way."""
    if packing.__module__ == __name__:
        return packing.__qualname__
    try:
        text = inspect.getsource(packing)
    except (OSError, TypeError) as error:
        raise DataError(
            f"the rows of {packing.__qualname__} cannot be kept apart from another's, because its "
            "text is not known: define it in a file"
        ) from error
    return f"{packing.__module__}:{packing.__qualname__}\n{text}"


def _index(
    documents: Documents, packing: Packing, seq_len: int, seed: int | None, writer: ArrayWriter
) -> dict:
    start, lengths, info = _to_pack(documents, seq_len)
    shuffled = np.arange(len(lengths)) if seed is None else order(len(lengths), seed)
    pieces = packing.pack(lengths[shuffled], seq_len)
    if documents.scored is not None and len(pieces.length) > len(lengths):
        raise DataError(
            f"data.packing={type(packing).__name__} cuts records in two, and a response would lose "
            "its prompt: use BestFit"
        )
    begin = start[shuffled[pieces.document]] + pieces.start
    num_rows = int(pieces.row[-1]) + 1
    writer.append("begin", begin.astype(np.int64))
    writer.append("length", pieces.length.astype(np.int32))
    writer.append("first", np.searchsorted(pieces.row, np.arange(num_rows + 1)).astype(np.int64))
    return info


def _to_pack(documents: Documents, seq_len: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """(first prediction, number of predictions) of what is packed, and what was left out."""
    start, lengths = documents.offsets[:-1], np.diff(documents.offsets)
    if documents.scored is None:
        return start, lengths, {}
    before = np.append(0, np.cumsum(documents.scored[1:]))  # scored targets before a prediction
    kept = np.minimum(lengths, seq_len)
    num_scored = before[start + kept] - before[start]
    some = num_scored > 0
    if not some.any():
        raise DataError(
            f"none of {len(lengths)} records has a response within the first {seq_len} tokens: "
            "raise sequence_length"
        )
    info = {
        "num_scored": int(num_scored.sum()),
        "num_cut": int((lengths > seq_len).sum()),
        "num_left_out": int((~some).sum()),
    }
    return start[some], kept[some], info
