"""One record of a run to every writer."""

from __future__ import annotations

import time
from typing import Any

from moejax.train.writers import Writer


class Records:
    """Stamps records with the time and hands each to all `writers`; closes them at the end."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """`kind` is "run", "train", "eval" or "event"; values that are None are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        record = {"kind": kind, "step": step, "time": time.time(), "values": known}
        for writer in self._writers:
            writer.write(record)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *unused) -> None:
        for writer in self._writers:
            writer.close()
