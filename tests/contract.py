"""Finds the methods of a family."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from types import ModuleType

import flax.linen as nn
import pytest


def methods(family: ModuleType, *, of: type = object) -> list:
    """One pytest parameter for every public method class, derived from `of`, in the family's files.

    Each is built by its defaults, or by its file's `example()`, which returns one instance or a
    tuple of them. A class that is reached by neither fails the collection.
    """
    found = []
    for info in pkgutil.iter_modules(family.__path__, family.__name__ + "."):
        module = importlib.import_module(info.name)
        examples = module.example() if hasattr(module, "example") else ()
        examples = examples if isinstance(examples, tuple) else (examples,)
        for cls in _public_classes(module):
            if not issubclass(cls, of):
                continue
            instances = [e for e in examples if type(e) is cls] or [cls()]
            found += [pytest.param(i, id=f"{info.name}.{cls.__name__}") for i in instances]
    assert found, f"{family.__name__} has no methods"
    return found


def _public_classes(module: ModuleType) -> list[type]:
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass)]
    own = [c for c in classes if c.__module__ == module.__name__ and not c.__name__.startswith("_")]
    return [c for c in own if issubclass(c, nn.Module) or dataclasses.is_dataclass(c)]
