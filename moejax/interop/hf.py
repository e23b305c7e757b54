"""Hugging Face directories: `model_config`, `load` and `save`.

    model, variables = hf.load("OLMoE-1B-7B-0924")
    logits = model.apply(variables, tokens).logits
    hf.save(model, variables, "tuned", source="OLMoE-1B-7B-0924")

Weights are safetensors in bfloat16, float16 or float32, in one file or in shards, with a tensor
for every expert or the fused tensors of transformers 5. Nothing is computed on the way, so what
is loaded and saved again has the same bits. The MXFP4 experts of gpt-oss are read as bfloat16,
which holds their values exactly, and saved as such. The architectures are the files in
`architectures/`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Literal

import fiddle as fdl
import jax
import jax.numpy as jnp

from moejax.interop import architecture as architectures
from moejax.interop import description as descriptions
from moejax.interop import mapping
from moejax.interop.config_json import ConfigJson
from moejax.interop.description import Description
from moejax.interop.reading import StoredLeaf, check_names
from moejax.interop.same_model import differences
from moejax.interop.tensor_files import read_json
from moejax.interop.tensor_writer import appearing_whole, write_json, write_tensors
from moejax.interop.writing import tensors_of
from moejax.models.adapter import Adapter
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.types import named_leaves, tree_of

_log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_CONFIG = "config.json"
# Carried along from `source`: what tokenizing and generation need, and nothing else.
_CARRIED = (
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)


def model_config(directory: PathLike) -> fdl.Config:
    """The config of the `Transformer` that `directory/config.json` describes.

    It is a fiddle config, so that overrides reach inside; `fdl.build` makes the model.

    Raises:
      UserError: the file is missing, its architecture is unknown, or it asks for something that
        moejax does not have.
    """
    source = ConfigJson(pathlib.Path(directory) / _CONFIG)
    return architectures.of(source).config(source)


def load(directory: PathLike) -> tuple[Transformer, Variables]:
    """The model of a Hugging Face directory and its variables, shaped as by `Transformer.init`.

    Every leaf has the dtype that it is stored in (router state at least float32), and is put
    together from slices of the files; one leaf at a time is in host memory.

    Raises:
      UserError: as `model_config`; a file is missing, truncated, a pickle or outside the folder; a
        tensor is missing, unknown or of the wrong shape or dtype; tied weights differ.
    """
    model, leaves = stored(directory)
    return model, tree_of({leaf.path: jnp.asarray(leaf[()]) for leaf in leaves})


def stored(
    directory: PathLike, *, adapter: Adapter | None = None
) -> tuple[Transformer, Iterator[StoredLeaf]]:
    """`load` with leaves that are not yet read; reading one may raise UserError too.

    With `adapter` the model has it, and its layers are stacked accordingly; what it adds is not
    among the leaves.
    """
    directory = pathlib.Path(directory)
    found = descriptions.read(directory / _CONFIG)
    model = dataclasses.replace(found.model, adapter=adapter)
    return model, _stored_leaves(directory, model, found)


def load_into(directory: PathLike, model: Transformer, shardings: Variables) -> Variables:
    """The variables of a directory for a model of one's own, laid out as `shardings` say.

    The model may differ from what config.json describes where shapes do not tell (a window, an
    epsilon); that is a warning. Every device reads its own slices and nothing else.

    Raises:
      UserError: as `load`.
    """
    directory = pathlib.Path(directory)
    found = descriptions.read(directory / _CONFIG)
    for text in differences(model, found.model):
        _log.warning("%s describes another model: here %s", directory / _CONFIG, text)
    placed = named_leaves(shardings)
    make = jax.make_array_from_callback
    leaves = _stored_leaves(directory, model, found)
    return tree_of({x.path: make(x.shape, placed[x.path], x.__getitem__) for x in leaves})


def is_checkpoint(directory: PathLike) -> bool:
    """Whether there is a config.json of transformers."""
    path = pathlib.Path(directory) / _CONFIG
    return path.is_file() and "model_type" in read_json(path)


def _stored_leaves(
    directory: pathlib.Path, model: Transformer, found: Description
) -> Iterator[StoredLeaf]:
    files, named = found.architecture.files(directory), mapping.leaves(model, found.architecture)
    skipped = found.architecture.skipped(model.num_layers)
    check_names(files, named, skipped=skipped, tied=model.tied_head)
    return (StoredLeaf(files, leaf) for leaf in named)


def save(
    model: Transformer,
    variables: Variables,
    directory: PathLike,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    source: PathLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that `load` and `transformers` read. It appears whole or not at all.

    Args:
      model: of any known architecture; which one is found out.
      variables: `params`, and `router_state` where it takes part in selection. Leaves are arrays,
        or anything with `shape`, `dtype` and `leaf[index]`, which are then read part by part.
      directory: new or empty.
      dtype: of the stored parameters; None keeps each leaf's own. Router state always does.
      source: a Hugging Face directory of the same model, whose config.json and tokenizer files
        are carried along. Without it, a new config.json is written, and no tokenizer.
      max_shard_bytes: of the values in one file; a larger tensor has a file to itself.

    Raises:
      UserError: `directory` holds something; no architecture (or not that of `source`) is this
        model; a leaf is missing, has another shape, or does not fit into `dtype`.
    """
    if source is None:
        found = descriptions.of(model)
    else:
        found = descriptions.of_same_model(pathlib.Path(source) / _CONFIG, model)
    tensors = tensors_of(model, variables, found, dtype)
    embedding = next(tensor for tensor in tensors if "embed" in tensor.name)
    # The older of the two names of the dtype, which every version of transformers reads.
    stale = ("dtype", "quantization_config")  # what is written is not quantised
    values = {key: value for key, value in found.values.items() if key not in stale}
    values |= {"torch_dtype": str(embedding.dtype)}
    with appearing_whole(pathlib.Path(directory)) as partial:
        write_tensors(partial, tensors, max_shard_bytes)
        if source is not None:
            carry(source, partial)
        write_json(partial / _CONFIG, values)  # last: without it nothing is loaded


def carry(source: PathLike, target: PathLike) -> None:
    """Copies config.json and the files of tokenizing and generation from one folder to another."""
    target = pathlib.Path(target)
    target.mkdir(exist_ok=True)
    for pattern in (_CONFIG, *_CARRIED):
        for path in pathlib.Path(source).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
