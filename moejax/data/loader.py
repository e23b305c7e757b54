"""Batches by step number, as grain datasets.

The global batch of a step is a pure function of (seed, rows, weights, step). Host i of n takes
its i-th n-th; nothing else depends on the number of hosts, and there is no iterator state to
save. Mixing, repeating and shuffling act on row numbers, a whole batch at a time: grain's own
per-row `mix` and `shuffle` cost more than making the row does (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from moejax.data.errors import DataError
from moejax.data.mixture import Turns
from moejax.data.prefetch import Prefetch
from moejax.data.rows import PADDING, Rows, mixed_batch
from moejax.data.shuffle import keys, permute
from moejax.types import Batch

Shard = tuple[int, int]  # (this host, number of hosts)
_WHOLE: Shard = (0, 1)
_BLOCK = 4096  # row numbers are computed this many at a time


class TrainLoader:
    """Endless training batches. Each source is shuffled anew in each of its epochs.

    Args:
      parts: the packed sources.
      weights: one per part; shares of rows.
      batch_size: B, rows of the global batch.
      seed: of the shuffle.
      shuffle: False keeps the packed order, in every epoch.
    """

    def __init__(
        self,
        parts: Sequence[Rows],
        *,
        weights: Sequence[float] = (1.0,),
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        self._parts, self.batch_size = tuple(parts), batch_size
        self._seed, self._shuffle = seed, shuffle
        self._turns = Turns(tuple(weights))
        self._block = functools.lru_cache(maxsize=8)(self._compute_block)

    @property
    def num_rows(self) -> int:
        """Rows of all sources in one epoch each."""
        return sum(map(len, self._parts))

    def dataset(self, shard: Shard = _WHOLE) -> grain.MapDataset[Batch]:
        """Step -> this host's part of the step's batch."""
        host, num_hosts = _checked(shard, self.batch_size)
        size = self.batch_size // num_hosts
        first_rows = grain.MapDataset.range(
            host * size, sys.maxsize - self.batch_size, self.batch_size
        )
        return first_rows.map(lambda n: self.rows(n, size)).map(
            lambda rows: mixed_batch(self._parts, *rows)
        )

    def batch(self, step: int, shard: Shard = _WHOLE) -> Batch:
        """The batch of one step: numpy arrays [B, S], or [B / n, S] for `shard=(i, n)`."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        return self._dataset(shard)[step]

    def iterate(self, start_step: int, shard: Shard = _WHOLE) -> Prefetch[Batch]:
        """The batches from `start_step` on, made by a background thread; close it when done."""
        return Prefetch(functools.partial(self.batch, shard=shard), start=start_step)

    def apart(self) -> Iterator[Batch]:
        """Every training document that fits in a row, each in a row of its own, in order, once."""
        return iter(EvalLoader([part.apart() for part in self._parts], batch_size=self.batch_size))

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(part, row number) [count] of the rows `start`, ... of the endless sequence."""
        blocks = range(start // _BLOCK, (start + count - 1) // _BLOCK + 1)
        part, number = np.concatenate([self._block(b) for b in blocks], axis=1)
        begin = start - blocks[0] * _BLOCK
        return part[begin : begin + count], number[begin : begin + count]

    def _compute_block(self, block: int) -> np.ndarray:
        n = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64)
        part, turn = self._turns(n)
        number = np.empty_like(turn)
        for p, rows in enumerate(self._parts):
            here = part == p
            epoch, index = np.divmod(turn[here], len(rows))
            if self._shuffle:
                index = permute(index, len(rows), keys(self._seed, p, epoch))
            number[here] = index
        return np.stack([part, number])

    @functools.cached_property
    def _dataset(self):
        return functools.cache(self.dataset)


class EvalLoader:
    """Every held-out token exactly once, in order; the last batch is filled with padding rows."""

    def __init__(self, parts: Sequence[Rows], *, batch_size: int):
        self._parts, self.batch_size = tuple(parts), batch_size
        counts = [len(p) for p in parts]
        self._part = np.repeat(np.arange(len(counts)), counts)
        self._number = np.concatenate([np.arange(c) for c in counts])

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self._part) // self.batch_size)

    def dataset(self, shard: Shard = _WHOLE) -> grain.MapDataset[Batch]:
        """Index -> this host's part of the batch; finite."""
        host, num_hosts = _checked(shard, self.batch_size)
        size = self.batch_size // num_hosts
        first_rows = grain.MapDataset.range(
            host * size, host * size + len(self) * self.batch_size, self.batch_size
        )
        return first_rows.map(lambda n: mixed_batch(self._parts, *self._rows(n, size)))

    def batch(self, index: int, shard: Shard = _WHOLE) -> Batch:
        """One batch of numpy arrays [B, S], or [B / n, S] for `shard=(i, n)`."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} is outside [0, {len(self)})")
        return self.dataset(shard)[index]

    def iterate(self, shard: Shard = _WHOLE) -> Prefetch[Batch]:
        """All batches once, made by a background thread; close it if not read to the end."""
        return Prefetch(functools.partial(self.batch, shard=shard), start=0, stop=len(self))

    def __iter__(self) -> Iterator[Batch]:
        with self.iterate() as batches:
            yield from batches

    def _rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        part, number = (x[start : start + count] for x in (self._part, self._number))
        fill = (0, count - len(part))
        return np.pad(part, fill), np.pad(number, fill, constant_values=PADDING)


def _checked(shard: Shard, batch_size: int) -> Shard:
    host, num_hosts = shard
    if not 0 <= host < num_hosts:
        raise DataError(f"shard ({host}, {num_hosts}) is not (host, number of hosts)")
    if batch_size % num_hosts:
        raise DataError(
            f"a batch of {batch_size} rows cannot be shared by {num_hosts} hosts: make batch_size "
            "a multiple of the number of hosts"
        )
    return host, num_hosts
