"""Tiny Hugging Face directories for tests: models with golden logits, and edits of their files."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from moejax.interop import hf
from tests.models.test_hf_parity import GOLDEN, MODELS
from tests.models.test_hf_parity import _variables as golden_variables

WEIGHTS = "model.safetensors"


@functools.cache
def golden(name: str) -> Any:
    """Tokens, logits and parameters of transformers."""
    return np.load(GOLDEN / f"{name}.npz")


def variables(name: str) -> dict:
    """The golden parameters as the model stacks them."""
    return golden_variables(MODELS[name], golden(name))


def written(name: str, directory: pathlib.Path, **options: Any) -> pathlib.Path:
    """A directory of the golden parameters, with a config.json of the model's own."""
    hf.save(MODELS[name], variables(name), directory, **options)
    return directory


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a float32 directory, read by the library of the format."""
    files = sorted(directory.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def edit_tensors(directory: pathlib.Path, edit: Callable[[dict], Any]) -> None:
    """Stores what `edit` makes of the dictionary of tensors, in place."""
    values = tensors(directory)
    edit(values)
    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    safetensors.numpy.save_file(values, directory / WEIGHTS)


def edit_config(directory: pathlib.Path, **changes: Any) -> None:
    """Sets values of config.json; `...` removes one."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
