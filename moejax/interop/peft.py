"""Adapters of PEFT and of MoE-PEFT: `peft.save`, `peft.adapter_config` and `peft.load`.

    peft.save(model, variables, "adapter")
    model = dataclasses.replace(plain, adapter=fdl.build(peft.adapter_config("adapter", plain)))
    variables |= peft.load("adapter", model)

A folder of `adapter_model.safetensors` and `adapter_config.json`. Nothing is computed on the way:
what is saved and loaded again has the same bits, and so has what is loaded and saved. The base
model is one that `architectures/` knows: `lora_factors` says which of its projections have factors,
`peft_sites` where those lie in files, and `peft_config` what the JSON says.

PEFT has no mixtures of adapters. An adapter with a router is written and read in the layout of
MoE-PEFT, which `moe_peft` knows.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import fiddle as fdl
import numpy as np

from moejax.errors import UserError
from moejax.interop import description as descriptions
from moejax.interop import moe_peft, moe_peft_config, peft_config, peft_reading, peft_writing
from moejax.interop.architecture import Architecture
from moejax.interop.description import Description
from moejax.interop.moe_peft_parts import adapter_leaves, is_mixture
from moejax.interop.peft_sites import equal_bits
from moejax.interop.tensor_files import DTYPES
from moejax.interop.tensor_writer import Tensor, appearing_whole, write_file, write_json
from moejax.models.adapter import Adapter
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.models.variables import ADAPTERS
from moejax.types import named_leaves, tree_of

PathLike = str | os.PathLike[str]


def save(
    model: Transformer,
    variables: Variables,
    directory: PathLike,
    *,
    base_model: str | None = None,
    source: PathLike | None = None,
) -> None:
    """Writes a folder that `load` and `peft.PeftModel.from_pretrained` read; whole or not at all.

    What holds a mixture PEFT does not read; MoE-PEFT does, once the weights are a pickle.

    Args:
      model: with an adapter, of any known architecture.
      variables: with the collection `lora`; leaves are arrays, or give one at `[()]`.
      directory: new or empty.
      base_model: the name or folder by which PEFT finds the base model on its own.
      source: a Hugging Face folder of the base model; without it, the architecture is found out,
        which is not enough where only config.json says how outputs are ordered (DeepSeek-V3).

    Raises:
      UserError: `directory` holds something, the model has no known architecture or needs a
        `source`, or PEFT, of mixtures MoE-PEFT, has no words for its adapter.
    """
    if model.adapter is None:
        raise UserError("the model has no adapter: save it with `moejax export-hf`")
    base = _description(model, source)
    arrays = {path: np.asarray(x[()]) for path, x in _leaves(variables, model).items()}
    layout = moe_peft if is_mixture(model) else peft_writing
    config, tensors = layout.content(model, arrays, base.architecture)
    _check_settled(model, base)  # last: a source does not help where there are no words
    files = [
        Tensor(name=name, shape=x.shape, dtype=x.dtype, compute=lambda x=x: x)
        for name, x in tensors.items()
    ]
    with appearing_whole(pathlib.Path(directory)) as partial:
        write_file(partial / peft_reading.WEIGHTS, files)
        write_json(partial / peft_config.FILE, config.json(base_model=base_model))
        again = _loaded(partial, model, base.architecture)
        for path, array in arrays.items():
            if again[path].dtype != array.dtype or not equal_bits([array, again[path]]):
                raise ValueError(f"{path} would not be read as it was written")


def adapter_config(
    directory: PathLike, model: Transformer, *, source: PathLike | None = None
) -> fdl.Config[Adapter]:
    """The config of the `Adapter` that a folder of PEFT or MoE-PEFT holds, for `model`.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors; of MoE-PEFT, with
        adapter_model.bin where torch is installed.
      model: the base; an adapter that it has is left aside.
      source: as in `save`.

    Raises:
      UserError: a file is missing or damaged; the adapter is of another base model, needs a
        `source`, or has what `Adapter` cannot express.
    """
    directory, base = pathlib.Path(directory), _description(model, source)
    if moe_peft_config.describes(directory):
        found = moe_peft.adapter(directory, model, base.architecture)
    else:
        found = peft_reading.read(directory, model, base.architecture).adapter
    _check_settled(dataclasses.replace(model, adapter=fdl.build(found)), base)
    return found


def holds_mixture(directory: PathLike) -> bool:
    """Whether the folder is one of MoE-PEFT, which PEFT does not read."""
    return moe_peft_config.describes(pathlib.Path(directory))


def load(
    directory: PathLike, model: Transformer, *, source: PathLike | None = None
) -> dict[str, dict]:
    """{"lora": the leaves of a PEFT folder}, for a model with that adapter.

    Every leaf has the dtype in which it is stored.

    Raises:
      UserError: as `adapter_config`; the model has another adapter.
    """
    found = _loaded(pathlib.Path(directory), model, _architecture(model, source))
    return tree_of(found)


def stored(
    directory: PathLike, model: Transformer, *, source: PathLike | None = None
) -> list[LoadedLeaf]:
    """`load`, as leaves of a checkpoint; those have paths params/lora/..."""
    found = _loaded(pathlib.Path(directory), model, _architecture(model, source))
    return [LoadedLeaf(path=f"params/{path}", array=array) for path, array in found.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedLeaf:
    """An array in memory, for whoever writes checkpoints slice by slice."""

    path: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.array.dtype

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        return self.array[index]


def _loaded(
    directory: pathlib.Path, model: Transformer, architecture: Architecture
) -> dict[str, np.ndarray]:
    if model.adapter is None:
        raise UserError("the model has no adapter: give it that of peft.adapter_config")
    mixed = moe_peft_config.describes(directory)
    if mixed != is_mixture(model):
        kinds = ("plain LoRA", "a mixture of adapters")
        raise UserError(
            f"{directory} holds {kinds[mixed]}, and the model's adapter is {kinds[not mixed]}: "
            "attach the adapter that the folder describes"
        )
    if mixed:
        return moe_peft.leaves(directory, model, architecture)
    return peft_reading.leaves(peft_reading.read(directory, model, architecture), model)


def _architecture(model: Transformer, source: PathLike | None) -> Architecture:
    base = _description(model, source)
    _check_settled(model, base)
    return base.architecture


def _description(model: Transformer, source: PathLike | None) -> Description:
    if source is None:
        return descriptions.of(model)
    return descriptions.of_same_model(pathlib.Path(source) / "config.json", model)


def _check_settled(model: Transformer, base: Description) -> None:
    """Raises UserError where a factor may be stored in one order or another."""
    adapted = adapter_leaves(model) if model.adapter is not None else ()
    for kernel, key in base.unsettled.items():
        module = kernel.removesuffix("kernel")
        if any(leaf.split("/", 2)[2].startswith(module) for leaf in adapted):
            raise UserError(
                f"{key} in the base model's config.json says how the adapter of "
                f"{module.strip('/').replace('/', '.')} is stored, and the model does not: give "
                "source=, the folder of the base model with its config.json (hf/ of a run)"
            )


def _leaves(variables: Variables, model: Transformer) -> dict:
    """{path: leaf} of what the adapter adds; all there, of the model's shapes."""
    found = named_leaves({ADAPTERS: variables.get(ADAPTERS, {})})
    wanted = adapter_leaves(model)
    for path, asked in wanted.items():
        if path not in found:
            raise UserError(f"variables lack the leaf {path}")
        shape = tuple(found[path].shape)
        if shape != asked:
            raise UserError(
                f"the leaf {path} has shape {list(shape)}, but the model asks for {list(asked)}"
            )
        if np.dtype(found[path].dtype) not in DTYPES.values():
            raise UserError(f"the leaf {path} has dtype {found[path].dtype}: use float32")
    if lost := sorted(found.keys() - wanted.keys()):
        raise UserError(f"the leaf {lost[0]} is none of the model's")
    return found
