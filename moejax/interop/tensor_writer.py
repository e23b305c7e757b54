"""Writes a directory of safetensors shards, one tensor in memory at a time.

Everything goes to a folder beside the target that takes the target's name at the very end, so
that a killed process leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import safetensors

from moejax.errors import UserError
from moejax.interop.tensor_files import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to be written; `compute` makes its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_tensors(directory: pathlib.Path, tensors: Sequence[Tensor], max_bytes: int) -> None:
    """`model.safetensors`, or shards of at most `max_bytes` of values and their index.

    A tensor larger than that has a shard to itself.
    """
    shards = _shards(tensors, max_bytes)
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = {"total_size": sum(tensor.num_bytes for tensor in tensors)}
    write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})


def write_json(path: pathlib.Path, value: dict) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def appearing_whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into; it becomes `target` if and only if the block ends without error.

    Raises UserError where `target` is there already and holds anything.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rmdir()  # empty; a folder cannot be renamed onto another everywhere
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(path: pathlib.Path, tensors: Sequence[Tensor]) -> None:
    """One file: header, then values; the package that will read it checks it."""
    header: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = entry | {"data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.compute()).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    with safetensors.safe_open(path, framework="numpy"):
        pass


def _shards(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Runs of consecutive tensors, each as long as `max_bytes` allows."""
    shards: list[list[Tensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards
