"""Finds classes and functions by name, and names them: `module.path:Name` or `file.py:Name`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import linecache
import pathlib
import pkgutil
import sys
import traceback
import types
from typing import Any

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of Python that was imported by its path, as it was at that moment."""

    path: str  # absolute
    text: str
    module: types.ModuleType

    @property
    def sha256(self) -> str:
        return sha256(self.text)


_BY_FILENAME: dict[str, SourceFile] = {}
_BY_MODULE: dict[str, SourceFile] = {}


def sha256(text: str) -> str:
    """The hash of a source text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def source_of(module_name: str) -> SourceFile | None:
    """The file that `import_file` made this module from, if it did."""
    return _BY_MODULE.get(module_name)


def import_file(path: str | pathlib.Path) -> types.ModuleType:
    """Imports a Python file by its path; once, unless it has changed since.

    The file's folder, the folder above it and the current one are searched for what it imports,
    after everything installed: `from configs import tiny` and `import my_helper` both work.

    Raises:
      UserError: no such file (the nearest names are given), or the file raises.
    """
    found = pathlib.Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"there is no file {str(path)!r}{_near_files(found)}")
    found = found.resolve()
    text = found.read_text(encoding="utf-8")
    return run_source(text, str(found), filename=str(found))


def run_source(text: str, path: str, *, filename: str) -> types.ModuleType:
    """Runs `text` as the module that the file at `path` is, or once was.

    The same text is run once. `filename` is what tracebacks show: the path itself, or a made-up
    name for a stored copy.
    """
    known = _BY_FILENAME.get(filename)
    if known is not None and known.text == text:
        return known.module
    for folder in (pathlib.Path(path).parent, pathlib.Path(path).parent.parent, pathlib.Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    name = f"{pathlib.Path(path).stem}_{sha256(filename + text)[:12]}"
    module = types.ModuleType(name)
    module.__file__ = filename
    # auto_config reads the source of what it decorates.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    sys.modules[name] = module
    try:
        exec(compile(text, filename, "exec"), module.__dict__)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise UserError(where_it_raised(error, filename)) from error
    source = SourceFile(path, text, module)
    _BY_FILENAME[filename] = _BY_MODULE[name] = source
    return module


def where_it_raised(error: Exception, filename: str) -> str:
    """One sentence and the line of `filename` at which `error` was raised."""
    line = None
    if isinstance(error, SyntaxError) and error.filename == filename:
        line = error.lineno
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == filename:
            line = frame.lineno
    shown = linecache.getline(filename, line or 0).strip()
    what = f"{type(error).__name__}: {str(error) or 'no message'}"
    if isinstance(error, SyntaxError):
        what = f"SyntaxError: {error.msg}"
    at = f"{filename}, line {line}" if line else filename
    return f"{at} raised {what}" + (f"\n    {shown}" if shown else "")


def find(symbol: str) -> Any:
    """The object named `module.path:Name` or `file.py:Name`.

    Raises:
      UserError: no such file, module or name; the nearest are given.
    """
    where, _, name = symbol.rpartition(":")
    module = import_file(where) if where.endswith(".py") else _import_module(where)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(name, public, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(f'{where}:{n}' for n in near)}?" if near else ""
        raise UserError(f"{where} has no class or function {name!r}{hint}")
    return getattr(module, name)


def _import_module(name: str) -> types.ModuleType:
    here = str(pathlib.Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise UserError(
                f"{name} cannot be imported: it needs {error.name!r}, which is not installed"
            ) from error
        raise UserError(f"there is no module {name!r}{_near_modules(name)}") from error


def _near_modules(name: str) -> str:
    parent, _, last = name.rpartition(".")
    while parent:
        try:
            folder = importlib.import_module(parent)
        except ImportError:
            parent, _, last = parent.rpartition(".")
            continue
        names = [m.name for m in pkgutil.iter_modules(getattr(folder, "__path__", []))]
        near = difflib.get_close_matches(last, names, n=3, cutoff=0.4)
        return f"; did you mean {' or '.join(f'{parent}.{n}' for n in near)}?" if near else ""
    return ""


def _near_files(path: pathlib.Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    others = sorted(p.name for p in folder.iterdir() if p.suffix == ".py" or _is_run(p))
    near = difflib.get_close_matches(path.name, others, n=3, cutoff=0.4)
    if near:
        return "; did you mean " + " or ".join(str(folder / n) for n in near) + "?"
    if others:
        return f"; {folder} holds {', '.join(others[:8])}"
    return f"; {folder} holds no Python file"


def _is_run(path: pathlib.Path) -> bool:
    return (path / "config.json").is_file()


def name_of(obj: Any) -> str:
    """`module:Name` of a class or function, stable across versions of the libraries.

    A file imported by its path is shown by its file name. Nested functions are shown with the
    name of their top-level package, since libraries move them between private modules.
    """
    from moejax.config import known

    public = known.public_name(obj)
    if public:
        return public
    obj = obj if hasattr(obj, "__qualname__") else type(obj)
    module = obj.__module__
    source = source_of(module)
    if source is not None:
        module = pathlib.Path(source.path).name
    elif "<locals>" in obj.__qualname__ and not module.startswith("moejax"):
        module = module.partition(".")[0]
    return f"{module}:{obj.__qualname__}"
