"""Which architecture a model is, and the config.json that says so."""

from __future__ import annotations

import dataclasses
import pathlib

import fiddle as fdl

from moejax.errors import UserError
from moejax.interop import architecture as architectures
from moejax.interop.architecture import Architecture
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Json, Stated
from moejax.interop.same_model import differences
from moejax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A config.json: its values, its architecture, and the model that it describes.

    Attributes:
      unsettled: {leaf: the key that says how it is stored}, where no file was at hand: a model
        does not say it, so a file of the same model may say otherwise.
    """

    architecture: Architecture
    values: Json
    model: Transformer
    unsettled: dict[str, str] = dataclasses.field(default_factory=dict)


def read(path: pathlib.Path, values: Json | None = None) -> Description:
    """What the config.json at `path` says, or what `values` would say there.

    Raises:
      UserError: there is none, its architecture is unknown, or moejax has no such model.
    """
    source = ConfigJson(path, values)
    architecture = architectures.of(source)
    config = architecture.config(source)
    try:
        model = fdl.build(config)
    except UserError as error:  # fiddle appends a report of the call, and keeps the original
        raise source.refuse(str(getattr(error, "proxy_base_exception", error))) from error
    return Description(architecture=architecture, values=source.values, model=model)


def of_same_model(path: pathlib.Path, model: Transformer) -> Description:
    """What the config.json at `path` says; UserError if it describes another model."""
    description = read(path)
    if found := differences(model, description.model):
        raise UserError(f"{path} describes another model: here {found[0]}")
    return description


def of(model: Transformer) -> Description:
    """A new config.json for `model`.

    An architecture is the model's if what it states about the model, read again, gives the
    model: what it has no words for cannot be lost unseen.

    Raises:
      UserError: there is none; the nearest is named, and how the model differs from it.
    """
    found: dict[str, list[str]] = {}
    unable: dict[str, list[str]] = {}  # what it would have to state, it cannot
    for name in architectures.known():
        architecture = architectures.named(name)
        values = architecture.json(model)
        values |= {"architectures": [architecture.class_name], "model_type": name}
        try:
            description = read(pathlib.Path("config.json"), values)
        except UserError as error:
            unable[name] = [str(error)]
            continue
        found[name] = differences(model, description.model)
        if not found[name]:
            return dataclasses.replace(description, unsettled=_unsettled(description))
    found = found or unable
    nearest = min(found, key=lambda name: len(found[name]))
    raise UserError(
        f"no Hugging Face architecture is this model; the nearest is {nearest}, but here "
        f"{'; '.join(found[nearest])}"
    )


def _unsettled(description: Description) -> dict[str, str]:
    """Leaves that are stored otherwise where a value is another, of which models say nothing."""
    architecture, found = description.architecture, {}
    for field in architecture.fields:
        if not isinstance(field, Stated) or not isinstance(field.value, bool):
            continue
        values = description.values | {field.key: not field.value}
        other = architecture.tensors_of(ConfigJson(pathlib.Path("config.json"), values))
        changed = [leaf for leaf, forms in other.items() if forms != architecture.tensors[leaf]]
        found |= dict.fromkeys(changed, field.key)
    return found
