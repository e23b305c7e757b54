"""Loads the config that a command line names: a file, a function in it, or a run's folder."""

from __future__ import annotations

import difflib
import inspect
import os
import pathlib
import types
from typing import Any

import fiddle as fdl

from moejax.config import paths, symbols
from moejax.config.serialize import load_dumped
from moejax.errors import UserError


def load_config(spec: str | os.PathLike, *, trusted: bool = False) -> fdl.Config:
    """Loads `configs/tiny.py`, `configs/tiny.py:smoke`, or the folder of a run.

    Of a file, the function after the colon is called (`config` where none is given). It is
    decorated with fiddle's `auto_config`, or returns a `fdl.Config`. Of a folder, `config.json`
    is read, which runs no code from it.

    Args:
      spec: what to load.
      trusted: let a run's `config.json` name any code (`--trust-config`).

    Raises:
      UserError: no such file or function, a file that raises, a function that returns something
        else, or a `config.json` that names code which is not allowed.
    """
    spec = os.fspath(spec)
    path, colon, function = spec, "", "config"
    if not os.path.exists(spec) and ":" in spec:
        path, colon, function = spec.rpartition(":")
    stored = pathlib.Path(path)
    stored = stored / "config.json" if stored.is_dir() else stored
    if stored.suffix == ".json":
        if colon:
            raise UserError(f"{path} holds a stored config and no function: leave out :{function}")
        return _load_run(stored, trusted=trusted)
    if stored.suffix != ".py" and stored.is_file():
        raise UserError(f"{path} is no config: name a .py file or the folder of a run")
    return _call(symbols.import_file(path), path, function)


def _load_run(path: pathlib.Path, *, trusted: bool) -> fdl.Config:
    if not path.is_file():
        held = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f"; it holds {', '.join(held[:8])}" if held else ""
        raise UserError(f"{path.parent} is no run: it holds no config.json{hint}")
    return load_dumped(path.read_text(encoding="utf-8"), trusted=trusted, directory=path.parent)


def _call(module: types.ModuleType, path: str, name: str) -> fdl.Config:
    functions = config_functions(module)
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        listed = ", ".join(f"{path}:{f}" for f in functions) or "none"
        hint = f"; did you mean {path}:{near[0]}?" if near else ""
        raise UserError(f"{path} has no config function {name!r}{hint} (it has: {listed})")
    function = functions[name]
    try:
        result = function.as_buildable() if hasattr(function, "as_buildable") else function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(symbols.where_it_raised(error, str(module.__file__))) from error
    if not isinstance(result, fdl.Config):
        raise UserError(
            f"{path}:{name} returned {type(result).__name__}, not a fdl.Config: decorate it with "
            "@auto_config, or return a config such as config.as_buildable()"
        )
    return paths.as_config(result)


def config_functions(module: types.ModuleType) -> dict[str, Any]:
    """The functions of a config file that may be named after the colon, in file order."""
    public = {n: f for n, f in vars(module).items() if not n.startswith("_")}
    return {n: f for n, f in public.items() if _is_config(f, module)}


def _is_config(function: Any, module: types.ModuleType) -> bool:
    if hasattr(function, "as_buildable"):
        function = function.func
    elif not inspect.isfunction(function):
        return False
    if function.__module__ != module.__name__:
        return False
    try:
        inspect.signature(function).bind()
    except TypeError:  # it needs arguments: a helper
        return False
    return True
