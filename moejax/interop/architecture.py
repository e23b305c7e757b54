"""What an architecture file declares, and how the right one is found."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import fiddle as fdl

from moejax.interop import architectures
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import FieldLike, Json
from moejax.interop.tensor_files import TensorFiles
from moejax.interop.views import Tensors

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `model_type` of transformers, as a model of ours.

    Attributes:
      class_name: of the causal language model, for `architectures` in config.json.
      template: a config of `Transformer` with what is fixed in this architecture.
      fields: what config.json says about the rest; read in this order.
      tensors: how every leaf is stored.
      tensors_of: the same for leaves about whose storage config.json has a say.
      skipped: prefixes of tensors that transformers does not load either, given the number of
        layers.
      quantised: what reads the files of each `quant_method` that this architecture's may have.
      files: what reads its files.
    """

    class_name: str
    template: Callable[[], fdl.Config]
    fields: tuple[FieldLike, ...]
    tensors: Tensors
    tensors_of: Callable[[ConfigJson], Tensors] = lambda source: {}
    skipped: Callable[[int], tuple[str, ...]] = lambda num_layers: ()
    quantised: dict[str, type[TensorFiles]] = dataclasses.field(default_factory=dict)
    files: type[TensorFiles] = TensorFiles

    def config(self, source: ConfigJson) -> fdl.Config:
        """The config of the `Transformer` that `source` describes."""
        config = self.template()
        _check_causal(source)
        for field in self.fields:
            field.read(source, config)
        if unread := source.unread():
            _log.warning("%s: ignored, as unknown here: %s", source.path, ", ".join(unread))
        return config

    def json(self, model: Any) -> Json:
        """What config.json says of `model`; what it cannot say is left out."""
        return {key: value for field in self.fields for key, value in field.write(model).items()}


def _check_causal(source: ConfigJson) -> None:
    """Raises UserError where positions see later ones, as any file may ask of transformers 5.

    Files of ours state neither key: causal is what a file without them means.
    """
    for key, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        source.get(key, None)  # it is known
        # A null is no absence for transformers, which takes it for false.
        if bool(value := source.values.get(key, causal)) is not causal:
            raise source.refuse(
                f"{key}={value!r} is not supported, only {causal!r}: attention here is causal"
            )


@functools.cache
def known() -> tuple[str, ...]:
    """Every `model_type` there is a file for."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(architectures.__path__)))


def named(model_type: str) -> Architecture:
    """The architecture of that name, one of `known()`."""
    return importlib.import_module(f"{architectures.__name__}.{model_type}").ARCHITECTURE


def of(source: ConfigJson) -> Architecture:
    """The architecture of a config.json, with all its tensors and what reads them.

    Raises:
      UserError: it is none of ours, or quantised in a way that cannot be read.
    """
    model_type = source.get("model_type")
    if model_type not in known():
        raise source.refuse(
            f"model_type={model_type!r} is not an architecture that can be read; known are "
            f"{', '.join(known())}"
        )
    architecture = named(model_type)
    files = architecture.files
    if quantisation := source.get("quantization_config", None):
        method = quantisation.get("quant_method", "unnamed")
        if method not in architecture.quantised:
            raise source.refuse(
                f"weights quantised by the method {method!r} cannot be read: store them in "
                "bfloat16, float16 or float32 first"
            )
        files = architecture.quantised[method]
    tensors = architecture.tensors | architecture.tensors_of(source)
    return dataclasses.replace(architecture, tensors=tensors, files=files)
