"""Models with adapters, and PEFT folders, for tests."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import fiddle as fdl
import jax
import numpy as np
import safetensors.numpy

from moejax.interop import hf, peft
from moejax.models.adapter import Adapter
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.types import named_leaves, tree_of
from tests.models.tiny_model import random_model_variables

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(model: Transformer, adapter: Adapter) -> Transformer:
    """The model with the adapter."""
    return dataclasses.replace(model, adapter=adapter)


def factors(model: Transformer, *, seed: int = 0) -> Variables:
    """{"lora": random factors}, large enough to matter and small enough for float32."""
    lora = random_model_variables(model, seed=seed)["lora"]
    return {"lora": jax.tree.map(lambda x: 0.5 * np.asarray(x), lora)}


def opened(base: pathlib.Path, adapter: pathlib.Path) -> tuple[Transformer, Variables]:
    """The model of two folders with its variables: what `import-hf --adapter` would make."""
    plain, _ = hf.stored(base)
    config = peft.adapter_config(adapter, plain, source=base)
    model, leaves = hf.stored(base, adapter=fdl.build(config))
    variables = tree_of({leaf.path: np.asarray(leaf[()]) for leaf in leaves})
    return model, variables | peft.load(adapter, model, source=base)


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What the weights' file holds, read by the library of the format."""
    return safetensors.numpy.load_file(folder / WEIGHTS)


def settings(folder: pathlib.Path) -> dict[str, Any]:
    """What the JSON file says."""
    return json.loads((folder / CONFIG).read_text())


def edit(folder: pathlib.Path, change: Any = lambda values: None, **changes: Any) -> pathlib.Path:
    """Stores what `change` makes of the tensors, and sets values of the JSON file."""
    values = tensors(folder)
    change(values)
    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    safetensors.numpy.save_file(values, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings(folder) | changes))
    return folder


def assert_same_bits(left: dict[str, Any], right: dict[str, Any]) -> None:
    """The same leaves or tensors, dtypes and bits."""
    left, right = named_leaves(left), named_leaves(right)
    assert left.keys() == right.keys()
    for path, values in left.items():
        other = right[path]
        assert (values.dtype, values.shape) == (other.dtype, other.shape), path
        assert np.asarray(values).tobytes() == np.asarray(other).tobytes(), path
