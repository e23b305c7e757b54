"""Reads a file of `torch.save` through torch, which unpickles tensors and nothing that can run."""

from __future__ import annotations

import importlib
import pathlib
import pickle
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import UserError
from moejax.interop.tensor_files import DTYPES


class TorchFile:
    """The tensors of a pickled `{name: tensor}`, all in memory.

    Raises:
      UserError: torch cannot be imported, the file is damaged, or it holds something else.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._tensors = _loaded(path)

    @property
    def names(self) -> set[str]:
        """Every tensor there is."""
        return set(self._tensors)

    def file(self, name: str) -> pathlib.Path:
        """The file that holds the tensor."""
        del name
        return self._path

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype; UserError where it is no floating-point type that models use."""
        known = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
        stored = str(self._tensors[name].dtype).removeprefix("torch.")
        if stored not in known:
            raise UserError(
                f"{self._path}: tensor {name} is stored as {stored}; only {', '.join(known)} can "
                "be read"
            )
        return DTYPES[known[stored]]

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor. UserError where its shape is another."""
        dtype, tensor = self.dtype(name), self._tensors[name]
        if self.shape(name) != shape:
            raise UserError(
                f"{self._path}: tensor {name} has shape {list(self.shape(name))} and not "
                f"{list(shape)}"
            )
        tensor = tensor.detach().contiguous()
        if dtype != np.dtype(ml_dtypes.bfloat16):
            return tensor.numpy()
        torch: Any = importlib.import_module("torch")
        return tensor.view(torch.int16).numpy().view(dtype)  # numpy of torch knows no bfloat16


def _loaded(path: pathlib.Path) -> dict[str, Any]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"{path} is a pickle, which moejax reads through torch alone, and torch cannot be "
            f"imported ({error}): pip install torch, or convert the file where torch is, with "
            f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), "
            f"'{path.with_suffix('.safetensors').name}')"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which torch reads only where it may "
            f"run code ({reason})"
        ) from error
    is_tensor = lambda value: isinstance(value, torch.Tensor)
    if not isinstance(found, dict) or not all(is_tensor(value) for value in found.values()):
        raise UserError(f"{path} holds no tensors by name")
    return found
