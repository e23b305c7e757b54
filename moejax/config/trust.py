"""Decides which code a stored config may name. Loading one must run nothing that it brings.

Allowed without `trusted`:
  - dataclasses (Linen modules are dataclasses) defined in moejax, to be built, and functions
    beside them that return them, such as `moejax.data.source:python_stdlib`;
  - those classes, and functions of moejax's component packages, as values and in partials;
  - the pure library names listed in `known.py`;
  - dataclasses of the user's own file, if that file is still where it was, is the user's or
    root's, has the same hash, and lies neither in the run nor among the installed packages.
Everything else is refused, by name.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.machinery
import inspect
import os
import pathlib
import re
import sys
import sysconfig
from typing import Any

from moejax.config import annotations, known, symbols
from moejax.errors import UserError

_NAME = re.compile(r"[A-Za-z_]\w*")
_MODULE = re.compile(r"moejax(\.[a-z_]\w*)+")
_NEVER = ("moejax.commands", "moejax.config", "moejax.__main__")
_COMPONENTS = {
    *("routers", "balance", "transport", "experts", "adapters", "attention", "depth"),
    *("layers", "models", "objectives", "optim", "kernels"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The user's own code as a stored config records it."""

    path: str
    sha256: str
    text: str
    module: str | None  # the name it was imported by; None if it was imported by its path


@dataclasses.dataclass(frozen=True)
class Policy:
    """What one stored config may name. `directory` is the run's, where nothing is trusted."""

    sources: dict[str, Source]
    trusted: bool = False
    directory: pathlib.Path | None = None

    def resolve(self, name: str, *, call: bool, bind: bool = False) -> Any:
        """The object called `name`: to be built (`call`), to have arguments bound to it for a
        later call (`bind`), or to stand as a value.

        Raises:
          UserError: it is not allowed, or does not exist.
        """
        where, _, attribute = name.rpartition(":")
        listed = known.symbol(name)
        if listed is not None:
            return listed
        if where in self.sources:
            return self._user_code(where, attribute, call=call or bind)
        if self.trusted:
            return symbols.find(name)
        return _own(where, attribute, call=call)

    def _user_code(self, key: str, attribute: str, *, call: bool) -> Any:
        source = self.sources[key]
        path = pathlib.Path(source.path)
        unchanged = path.is_file() and symbols.sha256(_read(path)) == source.sha256
        if self.trusted:
            module = _import(source) if unchanged else _stored_copy(source)
            return getattr(module, attribute)
        name = f"{key}:{attribute}"
        if not unchanged:
            state = "has changed" if path.is_file() else "is gone"
            raise _refused(name, f"its file {source.path} {state} since the run was started")
        reason = _untrusted_place(path, self.directory)
        if reason:
            raise _refused(name, f"its file {source.path} {reason}")
        if attribute not in _top_level(source.path, call=call):
            what = "class" if call else "class or function"
            raise _refused(name, f"{source.path} defines no {what} of that name")
        found = getattr(_import(source), attribute)
        if call and not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise _refused(name, "only modules and dataclasses may be built")
        return found


def _refused(name: str, reason: str) -> UserError:
    return UserError(
        f"the stored config names {name!r}, which is not loaded because {reason}; if you trust "
        "this config, add --trust-config"
    )


def _own(where: str, attribute: str, *, call: bool) -> Any:
    """A component defined in moejax itself."""
    name = f"{where}:{attribute}"
    if not _MODULE.fullmatch(where) or not _NAME.fullmatch(attribute):
        raise _refused(name, "it is neither part of moejax nor a listed library function")
    if any(where == n or where.startswith(n + ".") for n in _NEVER):
        raise _refused(name, "it is no component")
    try:
        module = importlib.import_module(where)
    except ImportError:
        raise _refused(name, f"this version of moejax has no module {where}") from None
    found = vars(module).get(attribute)
    if getattr(found, "__module__", None) != where or found.__qualname__ != attribute:
        raise _refused(name, f"{where} does not define it")
    if isinstance(found, type):
        if not dataclasses.is_dataclass(found):
            raise _refused(name, "only modules and dataclasses may be built")
        return found
    family = where.split(".")[1]
    if call and family in _COMPONENTS | {"data"} and _is_factory(found, where):
        return found
    if call or family not in _COMPONENTS or not callable(found):
        raise _refused(name, "it is no component")
    return found


def _is_factory(function: Any, module: str) -> bool:
    """Whether the function is annotated to return a dataclass that its own module defines."""
    result = annotations.resolve(function).get("return")
    is_component = isinstance(result, type) and dataclasses.is_dataclass(result)
    return is_component and result.__module__ == module


def _read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _untrusted_place(path: pathlib.Path, directory: pathlib.Path | None) -> str | None:
    """Why code at this place is not the user's own, or None."""
    if not path.is_absolute() or path.resolve() != path:
        return "is not given by its real, absolute path"
    if directory is not None and path.is_relative_to(directory.resolve()):
        return "lies inside the run that names it"
    if _is_installed(path):
        return "is part of an installed package"
    if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
        return "belongs to another user"
    return None


def _is_installed(path: pathlib.Path) -> bool:
    """Whether the file is Python's own, moejax's, or lies among installed packages."""
    folders = [sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders.append(os.path.dirname(inspect.getfile(sys.modules["moejax"])))
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(pathlib.Path(folder).resolve()) for folder in folders)


def _top_level(path: str, *, call: bool) -> set[str]:
    """The classes (and functions, unless `call`) that a file defines, without running it."""
    kinds = (ast.ClassDef,) if call else (ast.ClassDef, ast.FunctionDef)
    try:
        body = ast.parse(_read(pathlib.Path(path))).body
    except (SyntaxError, ValueError):
        return set()
    return {node.name for node in body if isinstance(node, kinds)}


def _import(source: Source) -> Any:
    """Imports an unchanged source under the name that it had."""
    if source.module is None:
        return symbols.import_file(source.path)
    path = pathlib.Path(source.path)
    parts = source.module.split(".")
    module_path = path.parent if path.name == "__init__.py" else path.with_suffix("")
    if list(module_path.parts[-len(parts) :]) != parts:
        return symbols.import_file(path)
    root = str(pathlib.Path(*module_path.parts[: -len(parts)]))
    loaded = sys.modules.get(source.module)
    if loaded is None:
        if root not in sys.path:
            sys.path.append(root)
        found = importlib.machinery.PathFinder.find_spec(parts[0])
        places = [*(found.submodule_search_locations or []), found.origin or ""] if found else []
        if any(pathlib.Path(p).is_relative_to(root) for p in places if p):
            loaded = importlib.import_module(source.module)
    if loaded is not None and pathlib.Path(loaded.__file__ or "").resolve() == path:
        return loaded
    return symbols.import_file(path)


def _stored_copy(source: Source) -> Any:
    """Runs the copy in the config itself: its file has changed, and the user trusts it."""
    return symbols.run_source(source.text, source.path, filename=f"<stored copy of {source.path}>")


def record(obj: Any) -> tuple[str, Source | None]:
    """The name to store for a class or function, and its source if it is the user's own.

    Raises:
      UserError: it cannot be found again by any name.
    """
    public = known.public_name(obj)
    if public is not None:
        return public, None
    module_name, name = obj.__module__, obj.__qualname__
    where = f"{module_name}:{name}"
    module = sys.modules.get(module_name)
    if not _NAME.fullmatch(name) or getattr(module, name, None) is not obj:
        raise UserError(
            f"{where} cannot be stored with the run: define it at the top level of a file, under "
            "its own name"
        )
    imported = symbols.source_of(module_name)
    if imported is not None:
        key = pathlib.Path(imported.path).name
        return f"{key}:{name}", Source(imported.path, imported.sha256, imported.text, None)
    if module_name.startswith("moejax."):
        return where, None
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py") or module_name == "__main__":
        if module_name == "__main__":
            raise UserError(f"{where} cannot be stored with the run: move it to a file of its own")
        return where, None
    path = pathlib.Path(file).resolve()
    if _is_installed(path):
        return where, None
    text = _read(path)
    return where, Source(str(path), symbols.sha256(text), text, module_name)
