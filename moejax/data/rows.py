"""Packed rows: row number -> tokens, targets, segments and positions, many rows at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from moejax.data.documents import Documents
from moejax.types import Batch

PADDING = -1  # the row number of a row without tokens


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
    """

    documents: Documents
    seq_len: int
    begin: np.ndarray
    length: np.ndarray
    first: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.first) - 1

    @functools.cached_property
    def efficiency(self) -> float:
        """The share of positions that are not padding."""
        return self.documents.num_predictions / (len(self) * self.seq_len)

    def row(self, number: int) -> Batch:
        """One row; fields are [1, S]."""
        return self.batch(np.array([number]))

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows as one batch of numpy arrays.

        Args:
          numbers: int64 [B] row numbers; `PADDING` gives a row of padding.

        Returns:
          Fields [B, S]; int32, `loss_mask` bool. Each piece is a segment, numbered from 1 within
          its row; its targets are the tokens that follow in its document, the last one included
          (at a cut that is the first token of the document's next piece).
        """
        pieces, slots, segments = self._pieces_of(numbers)
        lengths = self.length[pieces]
        num_rows, num_tokens = len(numbers), int(lengths.sum())
        ends = np.cumsum(lengths, dtype=np.int64)
        positions = np.arange(num_tokens, dtype=np.int32)
        stream = positions + np.repeat(self.begin[pieces] - (ends - lengths), lengths)
        positions -= np.repeat((ends - lengths).astype(np.int32), lengths)
        segments = np.repeat(segments, lengths)
        tokens = self.documents.tokens[stream]
        targets = np.empty_like(tokens)  # the next token, but at a piece's end the one beyond it
        targets[:-1] = tokens[1:]
        targets[ends - 1] = self.documents.tokens[self.begin[pieces] + lengths]
        where = None
        if num_tokens != num_rows * self.seq_len:
            used = np.bincount(slots, weights=lengths, minlength=num_rows)
            where = np.arange(self.seq_len) < used[:, None]
        shape = (num_rows, self.seq_len)
        return Batch(
            tokens=_spread(tokens, where, shape, np.int32),
            targets=_spread(targets, where, shape, np.int32),
            loss_mask=np.ones(shape, bool) if where is None else where,
            segment_ids=_spread(segments, where, shape, np.int32),
            positions=_spread(positions, where, shape, np.int32),
        )

    def _pieces_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every piece in the rows, in order: its number, its slot in [0, B), its segment id."""
        real = np.maximum(numbers, 0)
        first = self.first[real]
        counts = np.where(numbers >= 0, self.first[real + 1] - first, 0)
        slots = np.repeat(np.arange(len(numbers)), counts)
        within = np.arange(len(slots)) - np.repeat(np.cumsum(counts) - counts, counts)
        return first[slots] + within, slots, (within + 1).astype(np.int32)


def mixed_batch(parts: Sequence[Rows], part: np.ndarray, numbers: np.ndarray) -> Batch:
    """Rows of several splits as one batch.

    Args:
      parts: the packed splits, all of one row length.
      part: int64 [B], which of them each row comes from.
      numbers: int64 [B], the row number there; `PADDING` gives a row of padding.
    """
    if len(parts) == 1:
        return parts[0].batch(numbers)
    fields = [f.name for f in dataclasses.fields(Batch)]
    out = {}
    for p in np.unique(part):
        here = np.flatnonzero(part == p)
        batch = parts[p].batch(numbers[here])
        for name in fields:
            value = getattr(batch, name)
            full = out.setdefault(name, np.zeros((len(numbers), *value.shape[1:]), value.dtype))
            full[here] = value
    return Batch(**out)


def _spread(values: np.ndarray, where: np.ndarray | None, shape: tuple, dtype: type) -> np.ndarray:
    """Puts the values of the unpadded positions in place; the rest is 0."""
    if where is None:
        return values.astype(dtype, copy=False).reshape(shape)
    out = np.zeros(shape, dtype)
    out[where] = values
    return out
