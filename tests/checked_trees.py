"""Lets JAX rebuild a dataclass without `__init__`, whose annotations the tests check.

`jax.tree_util.register_dataclass` rebuilds through `__init__`, with whatever leaves there are:
placeholders, axis numbers, shardings, arrays with one more axis under `vmap` or `scan`. None of
them has to be what the fields are annotated with. Where code builds the object itself they do, and
there the check stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.tree_util import GetAttrKey


def register_dataclasses_of(package: str) -> None:
    """From now on `register_dataclass` registers the classes of `package` in this way."""
    register = jax.tree_util.register_dataclass

    def dispatch(cls: type, data_fields=None, meta_fields=None, **options):
        if cls.__module__.split(".")[0] != package:
            return register(cls, data_fields, meta_fields, **options)
        if data_fields is None:
            fields = dataclasses.fields(cls)
            meta_fields = [f.name for f in fields if f.metadata.get("static", False)]
            data_fields = [f.name for f in fields if f.name not in meta_fields]
        return _register(cls, data_fields, meta_fields)

    jax.tree_util.register_dataclass = dispatch


def _register(cls: type, data_fields: Sequence[str], meta_fields: Sequence[str]) -> type:
    def flatten(x):
        return [getattr(x, n) for n in data_fields], tuple(getattr(x, n) for n in meta_fields)

    def flatten_with_keys(x):
        leaves, meta = flatten(x)
        return list(zip(map(GetAttrKey, data_fields), leaves, strict=True)), meta

    def unflatten(meta, leaves):
        x = object.__new__(cls)
        for name, value in zip((*data_fields, *meta_fields), (*leaves, *meta), strict=True):
            object.__setattr__(x, name, value)  # the class may be frozen
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
