"""Reads the text after `path=` as a value of the type that the parameter is annotated with."""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator
from typing import Any

from moejax.config import annotations

SYMBOL = re.compile(r"(?P<where>[\w./~+-]*[\w]):(?P<name>[A-Za-z_]\w*)")
_WORDS = {"none": None, "null": None, "true": True, "false": False}


class NoMatch(ValueError):
    """No reading of the text is what the annotation asks for."""


def names_symbol(text: str) -> bool:
    """Whether the text has the form `module.path:Name` or `file.py:Name`."""
    return SYMBOL.fullmatch(text) is not None


def parse(text: str, annotation: Any) -> Any:
    """The first reading of `text` that fits `annotation`.

    Tried in this order: a Python literal; none, true and false in either case; numbers such as
    1e6 for an int and inf for a float; a list of bare words; the text itself as a string.

    Raises:
      NoMatch: none fits. Its argument is the most natural reading, for the error's text.
    """
    readings = list(_readings(text, annotation))
    for reading in readings:
        value = _converted(reading, annotation)
        if annotations.matches(value, annotation):
            return value
    raise NoMatch(readings[0])


def _readings(text: str, annotation: Any) -> Iterator[Any]:
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = text
    yield literal
    number = _number(text)
    if number is not None:
        yield number
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    if literal is text and "," in inner:
        yield _words(inner, annotation)
    if literal is not text:
        yield text


def _number(text: str) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    whole = "." not in text and number.is_integer()  # 1e6 steps; but 50.0 is no count
    return int(number) if whole else number


def _words(text: str, annotation: Any) -> Any:
    """`dense,moe` as a tuple, each word read as the annotation's element type."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    for member in annotations.members(annotation):
        args = typing.get_args(member)
        origin = typing.get_origin(member)
        if not isinstance(origin, type) or not issubclass(origin, (tuple, list)) or not args:
            continue
        try:
            return tuple(
                parse(w, args[0] if len(args) == 1 or args[-1] is ... else args[i])
                for i, w in enumerate(words)
            )
        except (NoMatch, IndexError):
            continue
    return text


def _converted(value: Any, annotation: Any) -> Any:
    """Lists for tuples, tuples for lists, floats for ints: where the annotation wants the other."""
    members = annotations.members(annotation)
    origins = {typing.get_origin(m) or m for m in members}
    if type(value) is int and float in origins and int not in origins:
        return float(value)
    if isinstance(value, list) and tuple in origins and list not in origins:
        return tuple(value)
    if isinstance(value, tuple) and list in origins and tuple not in origins:
        return list(value)
    if isinstance(value, str) and annotations.accepts_dtype(annotation):
        import jax.numpy as jnp

        return getattr(jnp, value, value) if annotations.is_dtype_name(value) else value
    return value
