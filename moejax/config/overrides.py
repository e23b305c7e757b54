"""Applies `path=value` overrides, the ones that a command line gives, to a config."""

from __future__ import annotations

import copy
import inspect
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any

import fiddle as fdl

from moejax.config import annotations, paths, symbols, values
from moejax.errors import UserError


def _print(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def apply_overrides(
    config: fdl.Config, overrides: Iterable[str], *, note: Callable[[str], None] = _print
) -> fdl.Config:
    """A copy of `config` with each `path=value` applied, in order.

    A value is a Python literal, none, true or false in either case, a bare word where a string
    is wanted, or a component, `module.path:Class` or `file.py:Class`. A component keeps the
    arguments of the one it replaces that it has a parameter for; `note` is told of the others.
    Later overrides reach inside it.

    Raises:
      UserError: an unknown path (the nearest are named), a value of the wrong type, or a
        component that does not exist.
    """
    config = copy.deepcopy(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(
                f"an override has the form path=value, such as steps=50, not {override!r}"
            )
        path = path.strip()
        paths.update(config, path, lambda node, text=text: _new_value(node, text.strip(), note))
    return config


def _new_value(node: paths.Node, text: str, note: Callable[[str], None]) -> Any:
    if values.names_symbol(text) and _wants_component(node):
        return _component(node, text, note)
    try:
        return values.parse(text, node.annotation)
    except values.NoMatch as no_match:
        raise UserError(wrong_type(node.path, node.annotation, no_match.args[0])) from None


def wrong_type(path: str, annotation: Any, value: Any) -> str:
    """The sentence that says what `path` takes and what it was given."""
    text = f"{path} takes {annotations.describe(annotation)}, not {shown(value)}"
    if isinstance(value, type):
        return f"{text}: write {value.__name__}() for an instance of it"
    if isinstance(value, str) and any(_is_component(m) for m in annotations.members(annotation)):
        return f"{text}: name a component as module.path:Class or file.py:Class"
    return text


def shown(value: Any) -> str:
    """The value and its type, for error messages."""
    if isinstance(value, fdl.Buildable):
        return f"the component {symbols.name_of(fdl.get_callable(value))}"
    if isinstance(value, type) or inspect.isroutine(value):
        kind = "class" if isinstance(value, type) else "function"
        return f"the {kind} {symbols.name_of(value)}"
    return "None" if value is None else f"{value!r} ({type(value).__name__})"


def _is_component(annotation: Any) -> bool:
    """Whether the annotation can only be met by an object or a callable, never by a literal."""
    origin = typing.get_origin(annotation)
    if annotation is typing.Callable or origin is not None:
        return origin not in (tuple, list, dict, typing.Literal)
    plain = (int, float, bool, str, bytes, tuple, list, dict, set, type(None), None)
    return isinstance(annotation, type) and annotation not in plain


def _wants_component(node: paths.Node) -> bool:
    if isinstance(node.value, fdl.Buildable) or annotations.is_any(node.annotation):
        return True
    members = annotations.members(node.annotation)
    return any(_is_component(m) or annotations.is_any(m) for m in members)


def _component(node: paths.Node, symbol: str, note: Callable[[str], None]) -> Any:
    found = symbols.find(symbol)
    if hasattr(found, "as_buildable"):  # a part of a config, under auto_config
        return _fitting(node, paths.as_config(found.as_buildable()))
    if _is_called(found, node):
        return _called(node, found, note)
    return _fitting(node, found)


def _is_called(found: Any, node: paths.Node) -> bool:
    """Whether `found` makes the component, or is itself the value (a dtype, an activation)."""
    if isinstance(found, type):
        wants_type = any(typing.get_origin(m) is type for m in annotations.members(node.annotation))
        return not wants_type and not annotations.is_dtype_name(found)
    if not callable(found):
        return False
    result = annotations.resolve(found).get("return", Any)
    if not annotations.is_any(result) and annotations.makes_callable(result):
        return True  # such as jax.nn.initializers.normal, which returns the initialiser
    needs = [n for n, p in paths.parameters(found).items() if p.required]
    return not needs and not annotations.matches(found, node.annotation)


def _called(node: paths.Node, target: Any, note: Callable[[str], None]) -> fdl.Buildable:
    """A config of `target` with those arguments of the old component that it has too."""
    new = _fitting(node, fdl.Config(target))
    if not isinstance(node.value, fdl.Buildable):
        return new
    given, known = node.value.__arguments__, paths.parameters(target)
    kept = {k: v for k, v in given.items() if _keeps(known, k, v)}
    dropped = [f"{k}={_short(v)}" for k, v in given.items() if k not in kept]
    if dropped:
        name = symbols.name_of(target)
        note(f"{node.path}: dropped {', '.join(dropped)}, which {name} does not take")
    return fdl.Config(target, **kept)


def _keeps(known: dict[str, paths.Parameter], name: Any, value: Any) -> bool:
    return name in known and annotations.matches(value, known[name].annotation)


def _short(value: Any) -> str:
    if isinstance(value, fdl.Buildable):
        return symbols.name_of(fdl.get_callable(value))
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _fitting(node: paths.Node, value: Any) -> Any:
    if annotations.matches(value, node.annotation):
        return value
    message = wrong_type(node.path, node.annotation, value)
    missing = _missing(value, node.annotation)
    raise UserError(message + (f" (it lacks {', '.join(missing)})" if missing else ""))


def _missing(value: Any, annotation: Any) -> list[str]:
    target = fdl.get_callable(value) if isinstance(value, fdl.Buildable) else value
    protocols = [m for m in annotations.members(annotation) if getattr(m, "_is_protocol", False)]
    if not isinstance(target, type) or len(protocols) != 1:
        return []
    return annotations.missing_members(target, protocols[0])
