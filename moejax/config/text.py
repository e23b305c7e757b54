"""A config as text: one `path = value` per line, defaults included."""

from __future__ import annotations

from typing import Any

import fiddle as fdl

from moejax.config import known, paths, symbols


def config_text(config: fdl.Config) -> str:
    """Every path of `config` with its value, in tree order, defaults expanded.

    A component is shown as `path = module:Class`, its parameters below it; the root's path is a
    single dot. The text is the same under every supported version of Python and JAX.
    """
    return "".join(f"{path} = {value}\n" for path, value in _lines(config).items())


def config_diff(a: fdl.Config, b: fdl.Config) -> str:
    """The paths at which two configs differ: `path: old -> new`, one per line; "" if equal."""
    old, new = _lines(a), _lines(b)
    out = []
    for path in dict.fromkeys([*old, *new]):
        if old.get(path) != new.get(path):
            out.append(f"{path}: {old.get(path, '(none)')} -> {new.get(path, '(none)')}\n")
    return "".join(out)


def _lines(config: fdl.Config) -> dict[str, str]:
    lines: dict[str, str] = {}
    inside_literal: str | None = None  # a container shown whole, on one line
    for node in paths.walk(config):
        if inside_literal is not None and node.path.startswith(inside_literal):
            continue
        is_container = isinstance(node.value, (list, tuple, dict))
        if is_container and not _holds_component(node.value):
            inside_literal = node.path + "."
        lines[node.path or "."] = value_text(node.value)
    return lines


def _holds_component(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_component, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_component, value))
    return isinstance(value, fdl.Buildable)


def value_text(value: Any) -> str:
    """One value on one line. Containers of components show only their kind and length."""
    if value is paths.UNSET:
        return "(required, not set)"
    if isinstance(value, fdl.Buildable):
        partial = "partial " if isinstance(value, fdl.Partial) else ""
        return partial + symbols.name_of(fdl.get_callable(value))
    if isinstance(value, (list, tuple, dict)) and _holds_component(value):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(value_text, value)) + ("," if len(value) == 1 else "") + ")"
    return _scalar_text(value)


def _scalar_text(value: Any) -> str:
    dtype = known.dtype_name(value)
    if dtype is not None:
        return dtype.partition(":")[2]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if callable(value):
        return symbols.name_of(value)
    return repr(value)
