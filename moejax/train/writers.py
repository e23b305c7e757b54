"""Where a run's records go: JSON lines for machines, TensorBoard for eyes.

One record is `{"kind", "step", "time", "values"}`. `kind` is "run", "train", "eval" or "event";
`step` counts finished training steps; `time` is in seconds since 1970; `values` maps a name to a
number or a nested list of numbers (arrays become lists), in events also to text.

JSON has no NaN and no infinity, so they are written as the strings "nan", "inf" and "-inf";
`analysis.metrics_file.read_metrics` turns those back into floats.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moejax.errors import UserError

Record = dict[str, Any]
METRICS = "metrics.jsonl"  # in a run's folder
KINDS = ("run", "train", "eval", "event")
_BY_STEP = ("train", "eval")  # kinds that a resumed run writes again


@runtime_checkable
class Writer(Protocol):
    """What the loop needs of a writer."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends one line per record to `path`; a line is on its way to disk when `write` returns.

    A torn last line, left by a killed process, is removed on opening. With `resume_step`,
    lines of kind "train" and "eval" beyond that step are removed too, so that no step appears
    twice; pass the step of the restored checkpoint (0 for a run that starts anew), and as
    `last_eval` the last step whose evaluation this session does not make again, if that differs.
    The file is then another one, so that what an earlier process may still write reaches nothing.
    Raises UserError where the file cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resume_step: int | None = None,
        last_eval: int | None = None,
    ):
        self.path = pathlib.Path(path)
        last_eval = resume_step if last_eval is None else last_eval
        last = {} if resume_step is None else {"train": resume_step, "eval": last_eval}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _renew(self.path, last)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write metrics to {self.path}: {error.strerror}; choose another workdir"
            ) from error

    def write(self, record: Record) -> None:
        """Appends the record. Raises ValueError where it is not of the form above."""
        if record["kind"] not in KINDS:
            raise ValueError(f"record kind {record['kind']!r} is not one of {KINDS}")
        line = {
            "kind": record["kind"],
            "step": int(record["step"]),
            "time": float(record["time"]),
            "values": {name: _plain(value) for name, value in record["values"].items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes records of kind "train" and "eval" as TensorBoard scalars named `kind/name`.

    A value that is not finite is left out. A list becomes three scalars over its finite elements:
    `name/min`, `name/median`, `name/max`; JSON lines keep the whole. With `resume_step`, later
    points of the earlier run are hidden.
    """

    def __init__(self, directory: str | os.PathLike, *, resume_step: int | None = None):
        from tensorboardX import SummaryWriter  # slow to import, and not every run wants it

        purge = None if resume_step is None else resume_step + 1
        try:
            self._writer = SummaryWriter(str(directory), purge_step=purge)
        except OSError as error:
            raise UserError(
                f"cannot write TensorBoard files to {directory}: {error.strerror}; "
                "choose another workdir"
            ) from error

    def write(self, record: Record) -> None:
        if record["kind"] not in _BY_STEP:
            return
        for name, value in record["values"].items():
            for tag, scalar in _scalars(f"{record['kind']}/{name}", value):
                self._writer.add_scalar(tag, scalar, int(record["step"]), float(record["time"]))

    def close(self) -> None:
        self._writer.close()


def recorded(path: pathlib.Path, kind: str, step: int) -> bool:
    """Whether the metrics file has a record of this kind and step."""
    found = map(_parse, path.read_bytes().split(b"\n")) if path.exists() else ()
    return any(record and (record["kind"], record["step"]) == (kind, step) for record in found)


def _renew(path: pathlib.Path, last: dict[str, int]) -> None:
    """Replaces the file in one move by one without its torn end and the steps beyond `last`."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    kept = b"".join(line + b"\n" for line in lines if not _is_later(_parse(line), last))
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(kept)
    partial.chmod(path.stat().st_mode)
    partial.replace(path)


def _is_later(record: Record | None, last: dict[str, int]) -> bool:
    return record is not None and record["step"] > last.get(record["kind"], record["step"])


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        complete = {"kind", "step", "time", "values"} <= record.keys()
    except (ValueError, AttributeError):
        return None
    return record if complete else None


def _plain(value: Any) -> Any:
    """Numbers, arrays, nested lists and text as what JSON can hold."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(f"a metric must be a number, a list of numbers or text, not {value!r}")
    if array.dtype.kind not in "biu":
        array = array.astype(np.float64)  # bfloat16 has no Python form of its own
    return _named(array.tolist())


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _scalars(tag: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, str):
        return
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 0:
        if np.isfinite(array):  # TensorBoard cannot draw the others
            yield tag, float(array)
        return
    finite = array[np.isfinite(array)]
    if finite.size:
        yield f"{tag}/min", float(finite.min())
        yield f"{tag}/median", float(np.median(finite))
        yield f"{tag}/max", float(finite.max())
