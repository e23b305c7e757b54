"""What a checkpoint says about itself: every leaf's shape, dtype and fingerprint, and the extras.

Stored as one JSON file beside the arrays, with a SHA-256 of its own content, so that a flipped bit
in the manifest (in the data position, say) is noticed like one in the arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moejax.errors import UserError
from moejax.train.fingerprint import start_fingerprints

FORMAT = 1  # raise when the meaning of a field changes
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class CorruptCheckpoint(Exception):
    """A checkpoint is not what was saved; the message names the part that differs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf as saved: `dtype` is jax's name, `key<...>` for PRNG keys."""

    shape: tuple[int, ...]
    dtype: str
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of one checkpoint. `extra` is the caller's JSON."""

    step: int
    leaves: dict[str, Leaf]
    extra: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The content with its checksum, as plain JSON values; `check_extra` before."""
        content = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))
        return {"sha256": _digest(content), "content": content}

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The inverse of `to_json`. Raises CorruptCheckpoint where the text is not as written."""
        try:
            stored = json.loads(text)
            digest, content = stored["sha256"], stored["content"]
            intact = digest == _digest(content)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpoint("its manifest is not readable") from error
        if not intact:
            raise CorruptCheckpoint("its manifest does not match its checksum")
        if content["format"] != FORMAT:
            raise UserError(
                f"the checkpoint has format {content['format']} and this version of moejax reads "
                f"format {FORMAT}; use the version that wrote it (versions: {content['versions']})"
            )
        leaves = {
            path: Leaf(**{**leaf, "shape": tuple(leaf["shape"])})
            for path, leaf in content["leaves"].items()
        }
        return cls(
            step=content["step"],
            leaves=leaves,
            extra=content["extra"],
            versions=content["versions"],
        )


def check_extra(extra: Any) -> None:
    """Raises TypeError where a manifest's `extra` holds what JSON cannot."""
    try:
        json.dumps(extra)
    except TypeError as error:
        raise TypeError(f"the checkpoint's `extra` must be plain JSON: {error}") from error


def describe(leaf: Any, fingerprint: str = "") -> Leaf:
    """The manifest's entry for an array or ShapeDtypeStruct."""
    return Leaf(shape=tuple(leaf.shape), dtype=str(leaf.dtype), fingerprint=fingerprint)


def start_manifest(
    step: int, leaves: Mapping[str, Any], extra: dict[str, Any]
) -> tuple[Callable[[], dict[str, Leaf]], Callable[[], dict[str, Any]]]:
    """(the entries of arrays, the manifest as plain JSON values).

    Each, called, waits for the arrays' fingerprints, which this has started to compute.
    Raises TypeError where `extra` holds what JSON cannot.
    """
    check_extra(extra)
    marks, bare = start_fingerprints(leaves), {path: describe(x) for path, x in leaves.items()}

    def described() -> dict[str, Leaf]:
        found = marks()
        return {p: dataclasses.replace(leaf, fingerprint=found[p]) for p, leaf in bare.items()}

    def manifest() -> dict[str, Any]:
        found = Manifest(step=step, leaves=described(), extra=extra, versions=versions())
        return found.to_json()

    return described, manifest


def check_structure(manifest: Manifest, wanted: Mapping[str, Any], *, source: str) -> None:
    """Raises UserError where the leaves are not exactly those `wanted` (path -> abstract)."""
    check_leaves(manifest, wanted, source=source)
    for path in manifest.leaves:
        if path not in wanted:
            raise UserError(
                f"{source} belongs to another experiment: it has {path}, which this configuration "
                "does not have; use another workdir or the configuration it was saved with"
            )


def check_leaves(manifest: Manifest, wanted: Mapping[str, Any], *, source: str) -> None:
    """Raises UserError that names the first wanted leaf that is missing or differs."""
    for path, abstract in wanted.items():
        saved, here = manifest.leaves.get(path), describe(abstract)
        if saved is None:
            found = "is not there"
        elif (saved.shape, saved.dtype) != (here.shape, here.dtype):
            found = f"is {saved.dtype}{list(saved.shape)} there"
        else:
            continue
        raise UserError(
            f"{source} belongs to another experiment: {path} {found} and "
            f"{here.dtype}{list(here.shape)} in this configuration; use another workdir or the "
            "configuration it was saved with"
        )


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the kind of device it ran on."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
