"""Checks values, and configs of values, against Python annotations (fiddle does not)."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import sys
import types
import typing
from typing import Any

import fiddle as fdl
import numpy as np

_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@functools.cache
def resolve(target: Any) -> dict[str, Any]:
    """The annotations of what `target` is called with; Any where one cannot be resolved."""
    owner = target
    if isinstance(target, type) and not dataclasses.is_dataclass(target):
        owner = target.__init__
    try:
        return typing.get_type_hints(owner)
    except Exception:  # one bad name must not hide the others: resolve them one by one
        return _resolve_each(owner)


def _resolve_each(owner: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for scope in reversed(inspect.getmro(owner) if isinstance(owner, type) else (owner,)):
        names = dict(vars(sys.modules.get(getattr(scope, "__module__", ""), types)))
        for name, annotation in inspect.get_annotations(scope).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, names, dict(vars(scope)))
                except Exception:
                    annotation = Any
            hints[name] = annotation
    return hints


def plain(annotation: Any) -> Any:
    """Strips Annotated, Final, ClassVar, NewType and type aliases."""
    while True:
        origin = typing.get_origin(annotation)
        if origin in (typing.Annotated, typing.Final, typing.ClassVar):
            annotation = typing.get_args(annotation)[0]
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    annotation = plain(annotation)
    if typing.get_origin(annotation) not in _UNIONS:
        return (annotation,)
    return tuple(m for a in typing.get_args(annotation) for m in members(a))


def is_any(annotation: Any) -> bool:
    """Whether the annotation says nothing that could be checked."""
    annotation = plain(annotation)
    unchecked = (Any, object, inspect.Parameter.empty)
    return annotation in unchecked or isinstance(
        annotation, (str, typing.TypeVar, typing.ForwardRef, typing.ParamSpec)
    )


def accepts_dtype(annotation: Any) -> bool:
    """Whether the annotation is, or like `jax.typing.DTypeLike` contains, a numpy dtype."""
    return any((typing.get_origin(m) or m) is np.dtype for m in members(annotation))


def matches(value: Any, annotation: Any) -> bool:
    """Whether `value`, or what a config of it will build, is what the annotation asks for."""
    if is_any(annotation):
        return True
    if isinstance(value, str) and accepts_dtype(annotation):
        return is_dtype_name(value)
    return any(is_any(m) or _matches_one(value, m) for m in members(annotation))


def _matches_one(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, fdl.Partial):
        return annotation is typing.Callable or origin is collections.abc.Callable
    if isinstance(value, fdl.Buildable):
        return _builds(fdl.get_callable(value), annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is typing.Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if annotation is typing.Callable or origin is collections.abc.Callable:
        return callable(value)
    if origin is type:
        return isinstance(value, type) and (is_any(args[0]) or issubclass(value, args[0]))
    if origin is not None:
        return _matches_container(value, origin, args)
    return _is_instance(value, annotation)


def _is_instance(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return isinstance(value, (float, int, np.floating, np.integer)) and not _is_bool(value)
    if annotation is int:
        return isinstance(value, (int, np.integer)) and not _is_bool(value)
    if annotation is np.dtype:
        return isinstance(value, np.dtype) or (isinstance(value, type) and is_dtype_name(value))
    if not isinstance(annotation, type):
        return True
    if getattr(annotation, "_is_protocol", False):
        return not isinstance(value, type) and not missing_members(type(value), annotation)
    try:
        return isinstance(value, annotation)
    except TypeError:
        return True


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def _matches_container(value: Any, origin: Any, args: tuple[Any, ...]) -> bool:
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(matches, value, args))
    if origin in _SEQUENCES:
        allowed = list if origin is list else (list, tuple)
        return isinstance(value, allowed) and all(matches(v, args[0]) for v in value)
    if origin in _MAPPINGS:
        return isinstance(value, collections.abc.Mapping) and all(
            matches(k, args[0]) and matches(v, args[1]) for k, v in value.items()
        )
    return _is_instance(value, origin)


def _builds(target: Any, annotation: Any) -> bool:
    """Whether calling `target` gives what the annotation asks for, as far as that is known."""
    if not isinstance(target, type):
        result = resolve(target).get("return", Any)
        return is_any(result) or any(_class_fits(m, annotation) for m in members(result))
    return _class_fits(target, annotation)


def _class_fits(cls: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if not isinstance(cls, type):  # a function that returns, say, a Callable
        return (typing.get_origin(cls) or cls) is (origin or annotation) or is_any(cls)
    if annotation is typing.Callable or origin is collections.abc.Callable:
        return issubclass(cls, collections.abc.Callable)
    wanted = origin or annotation
    if getattr(wanted, "_is_protocol", False):
        return not missing_members(cls, wanted)
    try:
        return isinstance(wanted, type) and issubclass(cls, wanted)
    except TypeError:
        return True


def makes_callable(annotation: Any) -> bool:
    """Whether every value that the annotation allows can be called."""
    return all(
        m is typing.Callable
        or typing.get_origin(m) is collections.abc.Callable
        or (isinstance(m, type) and issubclass(m, collections.abc.Callable) and m is not type)
        for m in members(annotation)
    )


def missing_members(cls: type, protocol: type) -> list[str]:
    """The names that `protocol` asks for and `cls` neither defines nor declares as a field."""
    declared = {n for c in cls.__mro__ for n in getattr(c, "__annotations__", {})}
    wanted: set[str] = set()
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False) and base is not typing.Protocol:
            wanted |= set(vars(base)) | set(vars(base).get("__annotations__", {}))
    wanted = {n for n in wanted if not n.startswith("_") or n == "__call__"}
    return sorted(n for n in wanted if not hasattr(cls, n) and n not in declared)


def is_dtype_name(value: Any) -> bool:
    """Whether `value` names a numpy or JAX dtype: "bfloat16", `float`, `np.int8`, `jnp.float32`.

    Any other class does not, though numpy takes one with an attribute `dtype` for it.
    """
    import jax.numpy as jnp

    if isinstance(value, type) and value not in (bool, int, float, complex):
        return issubclass(value, np.generic) or type(value) is type(jnp.float32)
    try:
        jnp.dtype(value)
    except (TypeError, ValueError):
        return False
    return True


def describe(annotation: Any) -> str:
    """The annotation in words, for error messages."""
    return " or ".join(dict.fromkeys(_describe_one(m) for m in members(annotation)))


def _describe_one(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if annotation is typing.Callable or origin is collections.abc.Callable:
        return "a callable"
    if origin is not None and args:
        inner = ", ".join("..." if a is Ellipsis else describe(a) for a in args)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))
