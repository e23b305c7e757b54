"""The values of a JSON object that another tool wrote, each asked for once and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

from moejax.errors import UserError
from moejax.interop.fields import Json

REQUIRED = object()  # as a default: there must be a value

Check = Callable[[Any], bool]


class CheckedValues:
    """The values of a file, each asked for once."""

    def __init__(self, values: Json, where: str):
        self._values, self._where = dict(values), where

    def take(self, name: str, check: Check, *, default: Any = REQUIRED) -> Any:
        """The value; the default where there is none, which None counts as."""
        value = self._values.pop(name, None)
        if value is None:
            if default is REQUIRED:
                raise UserError(f"{self._where} lacks {name}")
            return default
        if not check(value):
            raise UserError(f"{self._where}: {name}={value!r} is not what belongs there")
        return value

    def only(self, name: str, *supported: Any, default: Any = REQUIRED) -> Any:
        """The value, which must be one of these."""
        value = self.take(name, lambda value: True, default=default)
        if not any(value is one or value == one for one in supported):
            first = supported[0]
            raise UserError(f"{self._where}: {name}={value!r} is not supported, only {first!r}")
        return value

    def finish(self, *, ignored: Container[str] = ()) -> None:
        """Raises UserError for what nobody has asked for and is not `ignored`."""
        if unknown := sorted(name for name in self._values if name not in ignored):
            name = unknown[0]
            raise UserError(f"{self._where}: {name}={self._values[name]!r} is not supported")


def whole(value: Any) -> bool:
    """A number from 1 on, without fraction."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def number(value: Any) -> bool:
    """A finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def positive(value: Any) -> bool:
    """A number above 0."""
    return number(value) and value > 0


def not_negative(value: Any) -> bool:
    """A number, 0 or above."""
    return number(value) and value >= 0


def share(value: Any) -> bool:
    """A number in [0, 1)."""
    return not_negative(value) and value < 1
