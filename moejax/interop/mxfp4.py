"""Reads experts in MXFP4, blocks of 32 four-bit values that share a power of two, as bfloat16.

Rouhani et al., "Microscaling Data Formats", arXiv 2310.10537; the layout is that of gpt-oss (arXiv
2508.10925). A tensor `x` `[E, in, out]` is stored as `x_blocks` uint8 `[E, out, in/32, 16]`, two
values per byte and the low half first, and `x_scales` uint8 `[E, out, in/32]`, which stand for
2^(scale - 127). Every product is exact in bfloat16, but for those above its largest number, which
become infinite as in transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import UserError
from moejax.interop.tensor_files import TensorFiles
from moejax.interop.views import copy_into

_BF16 = np.dtype(ml_dtypes.bfloat16)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the fourth bit is the sign
_BYTES = 16  # of a block
_BLOCK = 2 * _BYTES  # values of a block
_BIAS, _NAN = 127, 255  # of scales
_BLOCKS, _SCALES = "_blocks", "_scales"
_PIECE = 2**14  # blocks that are decoded at a time, few enough to stay in the cache


class Mxfp4Files(TensorFiles):
    """Tensor files in which every pair `x_blocks`, `x_scales` is one bfloat16 tensor `x`.

    Raises:
      UserError: as `TensorFiles`; one of a pair is missing, or of another dtype or shape.
    """

    def __init__(self, directory: pathlib.Path):
        super().__init__(directory)
        self._pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        parts = [name for name in self.names if name.endswith((_BLOCKS, _SCALES))]
        for name in sorted({part.removesuffix(_BLOCKS).removesuffix(_SCALES) for part in parts}):
            self._join(name)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray | Packed:
        """The tensor, mapped and not yet read, packed or not. UserError where its shape differs."""
        if name not in self._pairs:
            return super().read(name, shape)
        self.check_shape(name, shape)
        file = f"{self.file(name)}: tensor {name}{_SCALES}"
        return Packed(file, *self._pairs[name], inputs=slice(None))

    def _join(self, name: str) -> None:
        """Puts the tensor `name` in the place of its two parts."""
        both = [f"{name}{_BLOCKS}", f"{name}{_SCALES}"]
        if lost := [part for part in both if part not in self]:
            raise UserError(f"{self.directory} lacks tensor {lost[0]}, the other half of {name}")
        if name in self:
            raise UserError(f"{self.file(name)} holds tensor {name} both as it is and as {both[0]}")
        blocks, scales = (self.read_bytes(part) for part in both)
        if blocks.ndim != 4 or blocks.shape != (*scales.shape, _BYTES):
            raise UserError(
                f"{self.file(both[0])}: tensors {both[0]} and {both[1]} have shapes "
                f"{list(blocks.shape)} and {list(scales.shape)}, but should have [E, out, "
                f"in/{_BLOCK}, {_BYTES}] and [E, out, in/{_BLOCK}]"
            )
        num_experts, outputs, num_blocks = scales.shape
        first, _ = (self._entries.pop(part) for part in both)
        shape = (num_experts, _BLOCK * num_blocks, outputs)
        self._entries[name] = dataclasses.replace(first, dtype="BF16", shape=shape)
        self._pairs[name] = blocks, scales


@dataclasses.dataclass(frozen=True)
class Packed:
    """A bfloat16 array `[E, in, out]` that is decoded where `numpy.asarray` or `copy_to` ask.

    Slices of it are of the same kind. `inputs` are those of the blocks' inputs that it shows, and
    `name` is what an error calls the scales.
    """

    name: str
    blocks: np.ndarray  # [E, out, in/32, 16]
    scales: np.ndarray  # [E, out, in/32]
    inputs: slice

    ndim = 3
    dtype = _BF16

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, inputs shown, outputs)."""
        num_experts, outputs, num_blocks = self.scales.shape
        return num_experts, len(range(_BLOCK * num_blocks)[self.inputs]), outputs

    def __getitem__(self, index: tuple[Any, ...]) -> Packed:
        """A slice for each of the three axes; an ellipsis for the first ones."""
        if index[0] is Ellipsis:
            index = (slice(None),) * (1 + self.ndim - len(index)) + index[1:]
        experts, inputs, outputs = index
        every = range(_BLOCK * self.scales.shape[-1])
        shown = every[self.inputs][inputs]
        # The blocks that hold anything of `shown`, then its place among their values.
        first, last = min(shown) // _BLOCK, max(shown) // _BLOCK + 1
        start = shown.start - first * _BLOCK
        return Packed(
            self.name,
            self.blocks[experts, outputs, first:last],
            self.scales[experts, outputs, first:last],
            slice(start, start + len(shown) * shown.step, shown.step),
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.copy_to(out)
        return np.asarray(out, dtype)

    def copy_to(self, target: np.ndarray) -> None:
        """`target[...] = self`, decoding a few outputs of an expert at a time."""
        if (np.asarray(self.scales) == _NAN).any():
            raise UserError(f"{self.name} holds the scale {_NAN}, which stands for no number")
        num_experts, outputs, num_blocks = self.scales.shape
        step = max(1, _PIECE // num_blocks)
        for expert in range(num_experts):
            for start in range(0, outputs, step):
                rows = slice(start, start + step)
                values = _decoded(self.blocks[expert, rows], self.scales[expert, rows])
                copy_into(target[expert, :, rows], values[:, self.inputs].T)


def _decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 `[R, 32 G]` of blocks `[R, G, 16]` and scales `[R, G]`."""
    index = (scales[..., None].astype(np.uint16) << 8) | blocks
    return np.take(_pairs_of_values(), index).view(_BF16).reshape(len(blocks), -1)


@functools.cache
def _pairs_of_values() -> np.ndarray:
    """uint32 `[65536]`: the bits of the two bfloat16 values of (scale, byte), the first one low."""
    codes = np.concatenate([_MAGNITUDES, np.negative(_MAGNITUDES)])
    byte, scale = np.arange(256), np.arange(256)[:, None, None] - _BIAS
    both = np.stack([codes[byte & 15], codes[byte >> 4]], axis=-1)  # [256, 2]
    with np.errstate(over="ignore"):
        values = np.ldexp(both, scale).astype(_BF16)  # [256, 256, 2]
    return np.ascontiguousarray(values).view("<u4").reshape(-1)
