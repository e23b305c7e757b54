"""Packed rows: row number -> tokens, targets, segments and positions, many rows at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from moejax.data.documents import Documents
from moejax.types import Batch

PADDING = -1  # the row number of a row without tokens
_ROWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """One packed split. Row r holds the pieces `first[r]` to `first[r + 1]`, in order.

    Attributes:
      documents: the token stream.
      seq_len: S.
      begin: int64 [num pieces], a piece's first prediction in the stream.
      length: int32 [num pieces], its number of predictions.
      first: int64 [num rows + 1], each row's first piece.
      fingerprint: of documents, packing, seq_len and seed.
      num_scored: targets that count, of all rows.
    """

    documents: Documents
    seq_len: int
    begin: np.ndarray
    length: np.ndarray
    first: np.ndarray
    fingerprint: str
    num_scored: int

    def __len__(self) -> int:
        return len(self.first) - 1

    @functools.cached_property
    def num_predictions(self) -> int:
        """Positions that are not padding, of all rows."""
        return int(self.length.sum(dtype=np.int64))

    @functools.cached_property
    def efficiency(self) -> float:
        """The share of positions that are not padding."""
        return self.num_predictions / (len(self) * self.seq_len)

    def num_bytes(self, token_bytes: np.ndarray) -> int:
        """UTF-8 bytes of the targets that count; `token_bytes` [V] are those of every token."""
        if self.documents.scored is None:
            return self.documents.num_bytes
        total = 0
        for start in range(0, len(self), _ROWS_AT_ONCE):
            batch = self.batch(np.arange(start, min(start + _ROWS_AT_ONCE, len(self))))
            total += int(token_bytes[batch.targets[batch.loss_mask]].sum(dtype=np.int64))
        return total

    def apart(self) -> Rows:
        """The same documents in order, one in each row, without those longer than a row."""
        offsets, scored = self.documents.offsets, self.documents.scored
        lengths = np.diff(offsets)
        fits = lengths <= self.seq_len
        counts = (
            lengths if scored is None else np.diff(np.append(0, np.cumsum(scored))[offsets + 1])
        )
        return dataclasses.replace(
            self,
            begin=offsets[:-1][fits],
            length=lengths[fits].astype(np.int32),
            first=np.arange(fits.sum() + 1),
            fingerprint=f"{self.fingerprint}, apart",
            num_scored=int(counts[fits].sum()),
        )

    def row(self, number: int) -> Batch:
        """One row; fields are [1, S]."""
        return self.batch(np.array([number]))

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows [B] as one batch; see `mixed_batch`."""
        return mixed_batch([self], np.zeros(len(numbers), np.int64), numbers)


def mixed_batch(parts: Sequence[Rows], part: np.ndarray, numbers: np.ndarray) -> Batch:
    """Rows of several splits as one batch of numpy arrays.

    Args:
      parts: the packed splits, all of one row length.
      part: int64 [B], which of them each row comes from.
      numbers: int64 [B], the row number there; `PADDING` gives a row of padding.

    Returns:
      Fields [B, S]; int32, `loss_mask` bool. Each piece is a segment, numbered from 1 within its
      row; its targets are the tokens that follow in its document, the last one included (at a
      cut that is the first token of the document's next piece). `loss_mask` is True where the
      target is scored: at every token that is not padding, but for dialogues. `sources` is None
      for one part.
    """
    shape = (len(numbers), parts[0].seq_len)
    rows_of = [np.flatnonzero(part == p) for p in range(len(parts))]
    pieces = _pieces(parts, rows_of, numbers, shape)
    ends = np.cumsum(pieces.length)
    starts = ends - pieces.length
    positions = np.arange(ends[-1], dtype=np.int32)
    stream = positions + np.repeat(pieces.begin - starts, pieces.length)
    positions -= np.repeat(starts.astype(np.int32), pieces.length)
    segment_ids = np.repeat(pieces.segment, pieces.length)
    padding = np.flatnonzero(segment_ids == 0)
    stream[padding] = 0  # any valid place: what is read there is replaced below
    tokens = _gather(parts, rows_of, stream.reshape(shape)).reshape(-1)
    targets = np.empty_like(tokens)  # the next token, but at a piece's end the one beyond it
    targets[:-1] = tokens[1:]
    targets[ends - 1] = pieces.last_target
    for field in (tokens, targets, positions):
        field[padding] = 0
    return Batch(
        tokens=tokens.reshape(shape),
        targets=targets.reshape(shape),
        loss_mask=_scored(parts, rows_of, stream.reshape(shape) + 1)
        & (segment_ids > 0).reshape(shape),
        segment_ids=segment_ids.reshape(shape),
        positions=positions.reshape(shape),
        sources=_sources(part, shape) if len(parts) > 1 else None,
    )


def _sources(part: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(part.astype(np.int32)[:, None], shape).copy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pieces:
    """The pieces that fill B rows exactly, in order; padding is a piece with segment 0. [n]"""

    begin: np.ndarray  # int64, in its part's stream
    length: np.ndarray  # int64
    segment: np.ndarray  # int32
    last_target: np.ndarray  # int32


def _pieces(
    parts: Sequence[Rows], rows_of: list[np.ndarray], numbers: np.ndarray, shape: tuple[int, int]
) -> _Pieces:
    found = [_part_pieces(rows, at, numbers[at]) for rows, at in zip(parts, rows_of, strict=True)]
    slot, begin, length, segment, last = (np.concatenate(x) for x in zip(*found, strict=True))
    free = shape[1] - np.bincount(slot, weights=length, minlength=shape[0]).astype(np.int64)
    padded = np.flatnonzero(free)
    none = np.zeros(len(padded), np.int32)
    by_row = np.argsort(np.concatenate([slot, padded]), kind="stable")  # padding comes last
    return _Pieces(
        begin=np.concatenate([begin, none])[by_row],
        length=np.concatenate([length, free[padded]])[by_row],
        segment=np.concatenate([segment, none])[by_row],
        last_target=np.concatenate([last, none])[by_row],
    )


def _part_pieces(rows: Rows, at: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of the pieces of one part's rows: (row of the batch, begin, length, segment, last target)."""
    real = np.maximum(numbers, 0)
    first = rows.first[real]
    counts = np.where(numbers >= 0, rows.first[real + 1] - first, 0)
    row = np.repeat(np.arange(len(numbers)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = first[row] + within
    begin, length = rows.begin[pieces], rows.length[pieces].astype(np.int64)
    last_target = rows.documents.tokens[begin + length].astype(np.int32)
    return at[row], begin, length, (within + 1).astype(np.int32), last_target


def _gather(parts: Sequence[Rows], rows_of: list[np.ndarray], stream: np.ndarray) -> np.ndarray:
    """int32 [B, S]: tokens at these places of each row's own stream."""
    if len(parts) == 1:
        return parts[0].documents.tokens[stream].astype(np.int32)
    out = np.empty(stream.shape, np.int32)
    for rows, at in zip(parts, rows_of, strict=True):
        out[at] = rows.documents.tokens[stream[at]]
    return out


def _scored(parts: Sequence[Rows], rows_of: list[np.ndarray], stream: np.ndarray) -> np.ndarray:
    """bool [B, S]: whether the tokens at these places of each row's own stream count."""
    out = np.ones(stream.shape, bool)
    for rows, at in zip(parts, rows_of, strict=True):
        if rows.documents.scored is not None:
            out[at] = rows.documents.scored[stream[at]]
    return out
