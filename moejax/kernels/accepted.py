"""Which implementation of a kernel to trust on which kind of device.

An implementation is taken by default only where it has passed the conformance kit and was timed: in
the shipped table, or on the user's own device by `moejax verify-kernels --accept`. A user's result
holds for one kind of device, one state of the kernels' sources and one set of versions: of JAX and
of what compiles and runs its programs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from moejax.errors import UserError

# Kernel -> kind of device -> what is taken there for every product. Figures: docs/benchmarks.md.
# The test suite runs the conformance kits on CPU; no accelerator has been measured yet.
SHIPPED = {
    "block_attention": {"cpu": "packed"},
    "full_attention": {"cpu": "scan"},
    "grouped_matmul": {"cpu": "tile_scan"},
    "least_loaded": {"cpu": "jnp"},
}

# Packages whose versions a result depends on: JAX, XLA and kernels for TPU and for CUDA.
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "tokamax", "jax-triton", "triton"),
    *(f"jax-cuda{cuda}-{part}" for cuda in (12, 13) for part in ("plugin", "pjrt")),
    *(f"nvidia-cudnn-cu{cuda}" for cuda in (12, 13)),
)


class Accepted(NamedTuple):
    """What may be taken: product -> implementation, and where that was measured."""

    choices: Mapping[str, str]
    source: str


def path() -> pathlib.Path:
    """The user's own results: `$MOEJAX_KERNELS`, or `moejax/kernels.json` in the cache folder."""
    if named := os.environ.get("MOEJAX_KERNELS"):
        return pathlib.Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "moejax" / "kernels.json"


def conditions(device_kind: str) -> dict[str, str | None]:
    """What a result depends on; None for a package that is not installed."""
    versions = {package: _version(package) for package in _PACKAGES}
    return {"device_kind": device_kind, **versions, "kernels": sources_hash()}


def look_up(
    kernel: str, dtype: str, device_kind: str, products: tuple[str, ...]
) -> Accepted | None:
    """What was accepted for `kernel` on operands of `dtype`; None where nothing was."""
    choices = by_user(device_kind).get(kernel, {}).get(dtype)
    if choices is not None:
        return Accepted(choices, f"accepted by moejax verify-kernels in {path()}")
    if shipped := SHIPPED.get(kernel, {}).get(device_kind):
        return Accepted(dict.fromkeys(products, shipped), "measured in docs/benchmarks.md")
    return None


def by_user(device_kind: str) -> Mapping[str, Any]:
    """`{kernel: {dtype: {product: implementation}}}` as the user accepted it for what runs here."""
    for record in _records(path()):  # mostly none, and then nothing has to be hashed
        if record["conditions"] == conditions(device_kind):
            return record["choices"]
    return {}


def is_stale(device_kind: str) -> bool:
    """Whether the user has accepted results for such a device under other conditions."""
    return any(
        record["conditions"]["device_kind"] == device_kind
        and record["conditions"] != conditions(device_kind)
        for record in _records(path())
    )


def store(device_kind: str, choices: Mapping[str, Any], figures: Mapping[str, Any]) -> pathlib.Path:
    """Writes results for this kind of device; returns the file's path.

    Replaces what was stored for the same kind of device, but for other kernels and dtypes under the
    same conditions.

    Args:
      device_kind: as JAX names it.
      choices: `{kernel: {dtype: {product: implementation}}}`.
      figures: `{kernel: {dtype: anything}}`, for the reader.
    """
    record = {"conditions": conditions(device_kind), "choices": choices, "figures": figures}
    kept = []
    for old in _records(path()):
        if old["conditions"] == record["conditions"]:
            for part in ("choices", "figures"):
                record[part] = _merged(old.get(part, {}), record[part])
        elif old["conditions"]["device_kind"] != device_kind:
            kept.append(old)
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([*kept, record], indent=1), encoding="utf-8")
    partial.replace(target)  # readers see the old file or the new one
    return target


@functools.cache
def sources_hash() -> str:
    """A digest of every file of `moejax.kernels`."""
    folder = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, by kernel and dtype; `new` where both have something."""
    return {kernel: {**old.get(kernel, {}), **new.get(kernel, {})} for kernel in {**old, **new}}


def _records(file: pathlib.Path) -> list[dict[str, Any]]:
    try:
        stamp = file.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return []
    return _parsed(file, stamp)


@functools.lru_cache(maxsize=4)
def _parsed(file: pathlib.Path, stamp: int) -> list[dict[str, Any]]:
    del stamp  # part of the key: a changed file is read again
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        complete = all({"conditions", "choices"} <= record.keys() for record in records)
    except (ValueError, AttributeError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            f"{file} does not hold results of moejax verify-kernels; delete it or run "
            "moejax verify-kernels --accept again"
        )
    return records


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
