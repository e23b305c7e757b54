"""Mixtures of LoRA in the layout of MoE-PEFT (TUDB-Labs): their config, tensors and leaves.

For `peft.py`, which decides between this layout and PEFT's. MoE-PEFT saves `adapter_model.bin`, a
pickle; it is read through torch, where there is no `adapter_model.safetensors`, and never written.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping

import fiddle as fdl
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.interop import moe_peft_adapter, moe_peft_config
from moejax.interop.architecture import Architecture
from moejax.interop.lora_factors import seen, stored
from moejax.interop.mapping import Part, abstract
from moejax.interop.moe_peft_config import MoePeftConfig
from moejax.interop.moe_peft_parts import parts
from moejax.interop.peft_config import FILE
from moejax.interop.peft_reading import WEIGHTS
from moejax.interop.tensor_files import TensorFiles
from moejax.interop.torch_file import TorchFile
from moejax.models.adapter import Adapter
from moejax.models.transformer import Transformer

PICKLE = "adapter_model.bin"

_log = logging.getLogger(__name__)


def content(
    model: Transformer, arrays: Mapping[str, np.ndarray], architecture: Architecture
) -> tuple[MoePeftConfig, dict[str, np.ndarray]]:
    """(what adapter_config.json says, the tensors by name) of a model's mixture.

    Args:
      model: with an adapter that is one.
      arrays: {path of a stacked leaf: values}, all of the adapter's.
      architecture: of the model.

    Raises UserError where MoE-PEFT has no words for it.
    """
    config = moe_peft_adapter.config_of(model, architecture)
    where = "the adapter, as MoE-PEFT would have it"
    moe_peft_config.parse(config.json(base_model=None), where=where)
    numbers = [x for x in (config.experts, config.plain) if x is not None]
    if not all(x.lora_dropout for x in numbers):
        _log.warning("lora_dropout is written as 0, which versions of MoE-PEFT refuse to load")
    return config, {
        part.tensor: stored(arrays[part.leaf][part.index], part.view)
        for part in parts(model, architecture, config.prefix)
    }


def adapter(
    directory: pathlib.Path, model: Transformer, architecture: Architecture
) -> fdl.Config[Adapter]:
    """The config of the `Adapter` in a folder, for a base model, of whose shapes its tensors are.

    Raises UserError where it is incomplete, of another model, or beyond what `Adapter` expresses.
    """
    config = moe_peft_config.read(directory)
    try:
        described = moe_peft_adapter.adapter_of(config, model, architecture)
    except UserError as error:
        raise UserError(f"{directory / FILE}: {error}") from error
    attached = dataclasses.replace(model, adapter=fdl.build(described))
    _checked(directory, parts(attached, architecture, config.prefix))
    return described


def leaves(
    directory: pathlib.Path, model: Transformer, architecture: Architecture
) -> dict[str, np.ndarray]:
    """{path of a stacked leaf: its values}, for a model with the adapter of a folder.

    Raises UserError as `adapter`, and where the model has another.
    """
    config = moe_peft_config.read(directory)
    moe_peft_adapter.check_same(config, model, architecture)
    own = parts(model, architecture, config.prefix)
    files = _checked(directory, own)
    dtypes: dict[str, list[np.dtype]] = {}
    for part in own:
        dtypes.setdefault(part.leaf, []).append(files.dtype(part.tensor))
    # In a dtype that holds all of a leaf's tensors exactly.
    found = {
        leaf: np.empty(abstract(model)[leaf].shape, functools.reduce(jnp.promote_types, some))
        for leaf, some in dtypes.items()
    }
    for part in own:
        found[part.leaf][part.index] = seen(files.read(part.tensor, part.tensor_shape), part.view)
    return found


def _checked(directory: pathlib.Path, own: list[Part]) -> TensorFiles | TorchFile:
    """The tensors of a folder, which are exactly those of `own`, of their shapes."""
    files = _opened(directory)
    wanted = {part.tensor: part for part in own}
    path = directory / (WEIGHTS if isinstance(files, TensorFiles) else PICKLE)
    if unknown := sorted(files.names - wanted.keys()):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{path} holds {unknown[0]}{more}, which is no part of the mixture that {FILE} "
            "describes for this base model: it is an adapter of another model, or of another kind"
        )
    for name, part in wanted.items():
        if name not in files.names:
            raise UserError(f"{path} lacks {name}, which {FILE} describes for this base model")
        if files.shape(name) != part.tensor_shape:
            raise UserError(
                f"{path}: {name} has shape {list(files.shape(name))}, but this base model and "
                f"{FILE} ask for {list(part.tensor_shape)}"
            )
        files.dtype(name)
    return files


def _opened(directory: pathlib.Path) -> TensorFiles | TorchFile:
    if not (directory / WEIGHTS).exists() and (directory / PICKLE).exists():
        return TorchFile(directory / PICKLE)
    return TensorFiles(directory, single=WEIGHTS)
