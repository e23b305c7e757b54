"""Stores a config as JSON and loads it back without running code that the JSON names.

Format 1. Numbers, strings, booleans, None and lists are themselves. Everything else is an
object with one key that starts with two underscores:

    {"__call__": "module:Class", "args": {...}, "defaults": {...}}    a component; __partial__ too
    {"__symbol__": "module:name"}                                     a class or function itself
    {"__dtype__": "jax.numpy:bfloat16"}   {"__tuple__": [...]}   {"__float__": "inf"}
    {"__dict__": [[key, value], ...]}     a dictionary whose keys are not all plain strings
    {"__default__": "text"}               a default that has no name: the class's own is used

`args` are what the config sets; `defaults` what the code's defaults were. On loading, a default
that has changed in the code since is set explicitly, so that a run stays as it was.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import fiddle as fdl

from moejax.config import known, paths, symbols
from moejax.config.check import check_shared
from moejax.config.trust import Policy, Source, record
from moejax.errors import UserError

FORMAT = 1


def dump_config(config: fdl.Config, versions: Mapping[str, str]) -> str:
    """`config` as JSON, with all defaults, the library versions, and the user's own code.

    Args:
      config: the root.
      versions: library name -> version, recorded as they are.

    Raises:
      UserError: something in it cannot be stored, or lies at two paths; the path is named.
    """
    check_shared(config)
    writer = _Writer()
    body = writer.write(config, "")
    sources = {
        key: {"path": s.path, "sha256": s.sha256, "module": s.module, "text": s.text}
        for key, s in sorted(writer.sources.items())
    }
    document = {"format": FORMAT, "versions": dict(versions), "config": body, "sources": sources}
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def code_of(config: fdl.Config) -> dict[str, set[str]]:
    """{file name: hashes of the texts under that name} of the user's own code in `config`."""
    writer, found = _Writer(), {}
    writer.write(config, "")
    for source in writer.sources.values():
        found.setdefault(pathlib.Path(source.path).name, set()).add(source.sha256)
    return found


def load_dumped(
    text: str, *, trusted: bool = False, directory: pathlib.Path | None = None
) -> fdl.Config:
    """The config that `dump_config` wrote, equal to the original.

    Args:
      text: the JSON.
      trusted: allow any code, and the stored copy of the user's code where its file has changed.
      directory: the run's folder, if known: code that lies inside it is never loaded.

    Raises:
      UserError: the text is no stored config, or names code that `trust.py` does not allow.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise UserError(
                f"the stored config has format {document['format']}, and this version of moejax "
                f"reads format {FORMAT}: use the version that wrote it"
            )
        sources = {k: Source(**s) for k, s in document["sources"].items()}
        body = document["config"]
        if "__call__" not in body:
            raise KeyError("__call__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"this is no stored config of moejax: {error!r}") from error
    policy = Policy(sources, trusted=trusted, directory=directory)
    try:
        return _Reader(policy).read(body, "")
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"this stored config is damaged: {error!r}") from error


class _Writer:
    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def write(self, value: Any, path: str) -> Any:
        dtype = known.dtype_name(value)
        if dtype is not None:
            return {"__dtype__": dtype}
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"__float__": repr(value)}
        if type(value) in (list, tuple):
            items = [self.write(v, _join(path, i)) for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"__tuple__": items}
        if type(value) is dict:
            return self._dict(value, path)
        if isinstance(value, fdl.Buildable):
            return self._component(value, path)
        if callable(value) and hasattr(value, "__qualname__") and hasattr(value, "__module__"):
            return {"__symbol__": self._name(value, path)}
        raise UserError(
            f"{path} holds {value!r} ({type(value).__name__}), which cannot be stored with the "
            "run: use numbers, strings, lists, dictionaries, dtypes, classes and functions"
        )

    def _dict(self, value: dict, path: str) -> Any:
        items = {k: self.write(v, _join(path, k)) for k, v in value.items()}
        if all(type(k) is str and not k.startswith("__") for k in items):
            return items
        return {"__dict__": [[self.write(k, path), v] for k, v in items.items()]}

    def _component(self, config: fdl.Buildable, path: str) -> Any:
        if type(config) not in (fdl.Config, fdl.Partial):
            raise UserError(f"{path} is a fiddle {type(config).__name__}: use Config or Partial")
        given, defaults = {}, {}
        for key, child in paths.children(config, Any):
            if child.value is paths.UNSET:
                continue
            here = _join(path, child.path)
            if child.explicit:
                given[str(key)] = self.write(child.value, here)
            else:
                defaults[str(key)] = self._default(child.value, here)
        kind = "__partial__" if isinstance(config, fdl.Partial) else "__call__"
        out = {kind: self._name(fdl.get_callable(config), path), "args": given}
        return {**out, "defaults": defaults} if defaults else out

    def _default(self, value: Any, path: str) -> Any:
        try:
            return self.write(value, path)
        except UserError:  # a closure, say: nobody can set it by a name either
            return {"__default__": symbols.name_of(value) if callable(value) else repr(value)}

    def _name(self, obj: Any, path: str) -> str:
        try:
            name, source = record(obj)
        except UserError as error:
            raise UserError(f"{path}: {error}" if path else str(error)) from error
        if source is None:
            return name
        key, _, attribute = name.rpartition(":")
        number = 1
        while self.sources.get(key, source).path != source.path:
            number += 1  # two files of the same name
            key = f"{name.rpartition(':')[0]}#{number}"
        self.sources[key] = source
        return f"{key}:{attribute}"


class _Reader:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def read(self, value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [self.read(v, _join(path, i)) for i, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        kinds = [k for k in value if k.startswith("__")]
        if not kinds:
            return {k: self.read(v, _join(path, k)) for k, v in value.items()}
        readers = {
            "__call__": self._component,
            "__partial__": self._component,
            "__symbol__": lambda v, p: self._symbol(v["__symbol__"], p, call=False),
            "__dtype__": self._dtype,
            "__tuple__": lambda v, p: tuple(self.read(v["__tuple__"], p)),
            "__float__": lambda v, p: float(v["__float__"]),
            "__dict__": lambda v, p: {self.read(k, p): self.read(x, p) for k, x in v["__dict__"]},
        }
        if len(kinds) != 1 or kinds[0] not in readers:
            raise UserError(f"the stored config has an unknown kind of value at {path}: {kinds}")
        return readers[kinds[0]](value, path)

    def _dtype(self, value: dict, path: str) -> Any:
        found = known.dtype(str(value["__dtype__"]))
        if found is None:
            raise UserError(f"{path}: there is no dtype {value['__dtype__']!r}")
        return found

    def _symbol(self, name: Any, path: str, **use: bool) -> Any:
        if not isinstance(name, str):
            raise UserError(f"{path}: a stored config names code by a string, not by {name!r}")
        try:
            return self.policy.resolve(name, **use)
        except UserError as error:
            raise UserError(f"{path}: {error}" if path else str(error)) from error

    def _component(self, value: dict, path: str) -> fdl.Buildable:
        kind = fdl.Config if "__call__" in value else fdl.Partial
        name = value.get("__call__", value.get("__partial__"))
        is_partial = kind is fdl.Partial
        target = self._symbol(name, path, call=not is_partial, bind=is_partial)
        given = {k: self.read(v, _join(path, k)) for k, v in value.get("args", {}).items()}
        positional = [given.pop(k) for k in sorted((k for k in given if k.isdigit()), key=int)]
        given.update(self._changed_defaults(target, value.get("defaults", {}), path))
        try:
            return kind(target, *positional, **given)
        except TypeError:
            unknown = sorted(set(given) - set(paths.parameters(target)))
            raise UserError(
                f"{path or 'the root'}: {name} of this version of moejax has no parameter "
                f"{', '.join(unknown)}: resume with the version that wrote the run"
            ) from None

    def _changed_defaults(self, target: Any, stored: dict, path: str) -> dict[str, Any]:
        """The recorded defaults that differ from those of the code as it is now, where they count.

        One that a prototype's owner replaces never does.
        """
        changed = {}
        now = paths.parameters(target)
        for name, value in stored.items():
            if isinstance(value, dict) and "__default__" in value:
                continue
            if name in now and now[name].set_by_owner:
                continue
            old = self.read(value, _join(path, name))
            if name not in now or not same_value(old, paths.default_of(now[name])):
                changed[name] = old
        return changed


def same_value(a: Any, b: Any) -> bool:
    """Equal in type and value, also inside containers; nan equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return a is b or bool(a == b)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
