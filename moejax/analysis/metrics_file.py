"""Reads a run's `metrics.jsonl`: one JSON record per line, as a crash may have left it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax.errors import UserError

_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_TEXTS = frozenset({"event", "text", "sample"})  # event values that are words, never numbers


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in file order: `{"kind", "step", "time", "values"}`.

    A last line that was cut off (the run is writing, or was killed) is left out. A line in the
    middle that cannot be read (a crash, then a resume) becomes a warning event that names it.
    "nan", "inf" and "-inf" become floats.

    Raises:
        UserError: there is no such file, or no line of it is a record.
    """
    return list(iter_metrics(path))


def iter_metrics(path: str | pathlib.Path) -> Iterator[dict[str, Any]]:
    """`read_metrics`, one record at a time: a long run need not fit in memory as Python lists."""
    path = pathlib.Path(path)
    good, bad, step = 0, [], 0
    for number, line, is_last in _lines(path):
        record = _parse(line)
        if record is None:
            # A resumed run writes its first record right behind the half line of a crash.
            record = _parse(line[max(line.rfind(b'{"kind"'), 0) :])
            if not is_last:
                bad.append(number)
                yield _unreadable(path, number, step)
        if record is not None:
            good += 1
            step = record["step"]
            yield record
    if bad and not good:
        raise UserError(
            f"{path} is not a metrics file: none of its lines is a record; "
            "point to the metrics.jsonl that `moejax train` wrote."
        )


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, text and "is an unfinished last line" of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line, not line.endswith(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # bad JSON and bad UTF-8 alike
        return None
    if not isinstance(record, dict) or not isinstance(record.get("values"), dict):
        return None
    if not isinstance(record.get("kind"), str) or not isinstance(record.get("step"), int):
        return None
    if record["kind"] != "run":  # a run may be called "nan"
        record["values"] = {
            name: value if name in _TEXTS else _numbers(value)
            for name, value in record["values"].items()
        }
    return record


def _numbers(value: Any) -> Any:
    if isinstance(value, str):
        return _NUMBERS.get(value.lower(), value)
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value


def _unreadable(path: pathlib.Path, number: int, step: int) -> dict[str, Any]:
    text = f"line {number} of {path.name} could not be read and is missing from this report"
    return {
        "kind": "event",
        "step": step,
        "time": None,
        "values": {"event": "warning", "text": text},
    }
