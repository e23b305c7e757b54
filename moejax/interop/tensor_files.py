"""Reads the safetensors files of a directory, one slice at a time.

Files are mapped into memory: whoever looks at a slice of a tensor reads that slice.
The `safetensors` package checks every header (offsets, overlaps, the file's length) before
anything is mapped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re

import ml_dtypes
import numpy as np
import safetensors

from moejax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_SHARD = re.compile(r"[^/\\]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: `start` counts bytes from the beginning of the file."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that an index names.

    `single` is another name of the one file, for what is never in shards.

    Raises:
      UserError: there are none, only pickles, a shard is missing or damaged, the index points
        out of the directory, or index and shards disagree.
    """

    def __init__(self, directory: pathlib.Path, *, single: str = SINGLE):
        self.directory = directory
        self._entries: dict[str, _Entry] = {}
        self._maps: dict[pathlib.Path, np.ndarray] = {}
        index = directory / INDEX
        if single == SINGLE and index.exists():
            self._open_shards(index)
        elif (directory / single).exists():
            self._open(directory / single)
        else:
            raise _no_weights(directory, single)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> set[str]:
        """Every tensor there is."""
        return set(self._entries)

    def file(self, name: str) -> pathlib.Path:
        """The file that holds the tensor."""
        return self._entries[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype; UserError where it is no floating-point type that models use."""
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file}: tensor {name} is stored as {entry.dtype}; "
                f"only {', '.join(DTYPES)} can be read"
            )
        return DTYPES[entry.dtype]

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor, mapped and not yet read. UserError where its shape is another."""
        dtype = self.dtype(name)
        self.check_shape(name, shape)
        return self._mapped(name, dtype)

    def read_bytes(self, name: str) -> np.ndarray:
        """A tensor of uint8, mapped and not yet read. UserError where it is none."""
        entry = self._entries[name]
        if entry.dtype != "U8":
            raise UserError(f"{entry.file}: tensor {name} is stored as {entry.dtype} and not as U8")
        return self._mapped(name, np.dtype(np.uint8))

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError where the tensor's shape is another."""
        entry = self._entries[name]
        if entry.shape != shape:
            raise UserError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but config.json "
                f"asks for {list(shape)}"
            )

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        entry = self._entries[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        num_bytes = math.prod(entry.shape) * dtype.itemsize
        values = self._maps[entry.file][entry.start : entry.start + num_bytes]
        return values.view(np.ndarray).view(dtype).reshape(entry.shape)

    def _open_shards(self, index: pathlib.Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map, which names the file of every tensor")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                raise UserError(
                    f"{index} points outside its folder, to {shard!r}: a shard must be a "
                    "*.safetensors file beside the index"
                )
        for shard in sorted(set(weight_map.values())):
            path = self.directory / shard
            if not path.exists():
                lost = next(name for name, file in weight_map.items() if file == shard)
                raise UserError(
                    f"the shard {path} is missing, which {INDEX} names for tensor {lost}: "
                    "download it again"
                )
            self._open(path)
        for name, shard in weight_map.items():
            if name not in self or self.file(name).name != shard:
                raise UserError(
                    f"{self.directory / shard} lacks tensor {name}, which {INDEX} says it holds"
                )

    def _open(self, path: pathlib.Path) -> None:
        try:
            with safetensors.safe_open(path, framework="numpy"):  # checks the whole header
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file ({error}): download it again"
            ) from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self:
                raise UserError(f"tensor {name} is in both {self.file(name)} and {path}: keep one")
            start = 8 + length + entry["data_offsets"][0]
            shape = tuple(entry["shape"])
            self._entries[name] = _Entry(path, entry["dtype"], shape, start)


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file; UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: give the folder of a Hugging Face checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _no_weights(directory: pathlib.Path, single: str) -> UserError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return UserError(
            f"{directory} holds weights only as pickle files ({pickles[0]}), which can run code "
            "when they are read and are refused: convert them to safetensors"
        )
    either = f"neither {SINGLE} nor {INDEX}" if single == SINGLE else f"no {single}"
    return UserError(f"{directory} holds {either}")
