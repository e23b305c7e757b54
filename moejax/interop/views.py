"""How an array of ours lies inside a tensor of a checkpoint: transposed, a half, every second.

All of these are numpy views, or can be read and written like one (`Reordered`), so one definition
does both: what a view shows of a tensor is our array, and what is copied into a view of an empty
tensor is stored. The round trip is exact because nothing is ever computed, but for the reading of
quantised tensors (`Computed`), which are written in another format.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

Shape = tuple[int, ...]
_TILE = 256  # words of 8 bytes: 512 KB, which stay in the cache until their entries are taken


@runtime_checkable
class Computed(Protocol):
    """An array that is made of stored ones, part by part, where it is asked for."""

    def copy_to(self, target: np.ndarray) -> None:
        """`target[...] = self`."""


@dataclasses.dataclass(frozen=True)
class View:
    """The last two axes swapped if `transpose`, then `part` of the last axis.

    Attributes:
      transpose: torch stores `[out, in]` where we store `[in, out]`.
      num_parts: how many arrays of ours share the last axis of the tensor.
      part: the slice of the last axis that is ours, given that axis' length.
    """

    transpose: bool = False
    num_parts: int = 1

    def part(self, size: int) -> slice:
        """All of the last axis."""
        return slice(size)

    def __call__(self, tensor: np.ndarray | Computed) -> np.ndarray | Computed:
        """Our array, a view of `tensor`. What is computed cannot be transposed."""
        turned = tensor.swapaxes(-1, -2) if self.transpose else tensor
        return turned[..., self.part(turned.shape[-1])] if turned.ndim else turned

    def tensor_shape(self, shape: Shape) -> Shape:
        """The shape of the tensor in which an array of `shape` is seen."""
        *others, last = shape
        turned = (*others, self.num_parts * last)
        return (*turned[:-2], turned[-1], turned[-2]) if self.transpose else turned


@dataclasses.dataclass(frozen=True)
class Run(View):
    """The `index`-th of `num_parts` equal runs of the last axis (gate first, then up)."""

    index: int = 0

    def part(self, size: int) -> slice:
        """A run of consecutive entries."""
        length = size // self.num_parts
        return slice(self.index * length, (self.index + 1) * length)


@dataclasses.dataclass(frozen=True)
class Every(View):
    """Entries `index`, `index + num_parts`, ... of the last axis (gpt-oss: gate, up, gate, ...)."""

    index: int = 0

    def part(self, size: int) -> slice:
        """Entries `num_parts` apart."""
        return slice(self.index, size, self.num_parts)


@dataclasses.dataclass(frozen=True)
class Reordered:
    """`array[..., order]`, of which numpy has no view; `order` holds every entry once."""

    array: np.ndarray
    order: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.array.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of the entries at `index`, a slice for every axis; no others are read."""
        *others, last = index
        # Tensors are stored with their outputs first, so these are whole rows in the file.
        rows = _bits(self.array[tuple(others)]).T
        return rows[self.order[last]].T.view(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * self.array.ndim], dtype)

    def fill(self, values: np.ndarray) -> None:
        """Stores `values`, a whole array of ours."""
        rows = np.empty(self.array.T.shape, self.dtype)
        copy_into(rows.T, values)
        _bits(self.array).T[self.order] = _bits(rows)


@dataclasses.dataclass(frozen=True)
class Pairs(View):
    """The last axis is heads of `kept` entries and `rotated` ones, stored in another order.

    Our rotary embedding turns the entries i and i + rotated/2 of a head by one angle, DeepSeek's
    the entries 2i and 2i + 1 (`rope_interleave`). Scores are the same if queries and keys are both
    reordered.
    """

    kept: int = 0
    rotated: int = 2

    def __call__(self, tensor: np.ndarray) -> Reordered:
        """Our array; `tensor` is written through it."""
        turned = super().__call__(tensor)
        heads = np.arange(turned.shape[-1]).reshape(-1, self.kept + self.rotated)
        first, second = heads[:, self.kept :: 2], heads[:, self.kept + 1 :: 2]
        order = np.concatenate([heads[:, : self.kept], first, second], axis=1).ravel()
        return Reordered(turned, order)


def copy_into(target: np.ndarray | Reordered, source: np.ndarray | Reordered | Computed) -> None:
    """`target[...] = source`, several times faster where one of them is transposed.

    Values of one dtype are moved as bits: numpy copies its own integers faster than bfloat16.
    """
    if isinstance(source, Computed):
        source.copy_to(target)
        return
    source = np.asarray(source)
    if isinstance(target, Reordered):
        target.fill(source)
        return
    if target.dtype != source.dtype:
        target[...] = source
        return
    target, source = _bits(target), _bits(source)
    if target.ndim < 2 or _row_major(target) == _row_major(source):
        target[...] = source
        return
    if not _row_major(target):
        target, source = target.swapaxes(-1, -2), source.swapaxes(-1, -2)
    for index in np.ndindex(target.shape[:-2]):
        _turn(target[index], source[index])


def _turn(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` [R, C] of unsigned integers, the one row-major, the other not.

    Tile by tile in two moves: words of 8 bytes, which are some entries of one column, to where they
    lie side by side, and from there, in the processor's cache, every entry to its row.
    """
    runs = source.strides[0] == source.itemsize  # not where ours is every second entry
    length = 8 // source.itemsize if runs else 1
    rows = len(target) // length * length
    target[rows:] = source[rows:]
    words = source[:rows].T.view(f"u{length * source.itemsize}")  # [C, R / length]
    target = target[:rows].reshape(-1, length, target.shape[1])  # [R / length, length, C]
    for row in range(0, words.shape[1], _TILE):
        for column in range(0, words.shape[0], _TILE):
            tile = np.ascontiguousarray(words[column : column + _TILE, row : row + _TILE].T)
            entries = tile.view(target.dtype).reshape(*tile.shape, length)
            to = (slice(row, row + _TILE), slice(None), slice(column, column + _TILE))
            target[to] = entries.swapaxes(1, 2)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.itemsize}"))


def _row_major(array: np.ndarray) -> bool:
    return array.strides[-1] <= array.strides[-2]


AS_IS = View()
TRANSPOSED = View(transpose=True)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way in which checkpoints store a leaf.

    Attributes:
      tensor: the tensor's name; `{layer}` stands for the layer's number and `{expert}`, where
        every expert has a tensor of its own, for the expert's.
      view: how the leaf of one layer (or of one expert) lies in that tensor.
    """

    tensor: str
    view: View = AS_IS

    @property
    def per_expert(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return "{expert}" in self.tensor


# {path of a leaf, within its layer: the forms it is read from; the first is the one written}.
Tensors = dict[str, tuple[Form, ...]]
