"""A run's folder holds its own config: enough to resume it, and to refuse another experiment."""

from __future__ import annotations

import os
import pathlib
import shlex
import uuid
from collections.abc import Callable, Mapping

import fiddle as fdl

from moejax.config.serialize import code_of, dump_config
from moejax.config.text import config_diff, config_text
from moejax.errors import UserError

CONFIG_JSON = "config.json"
CONFIG_TEXT = "config.txt"
_PARTIAL = ".partial"  # ends the name of all that a process killed while it claimed can leave

# What may change between two sessions of one run: nothing that a gradient depends on.
FREE = (
    "checkpoint_every",
    "data.cache_dir",
    "eval_every",
    "keep_every",
    "keep_last",
    "log_every",
    "mesh",
    "prompts",
    "sampling",
    "workdir",
)


def check_workdir(
    workdir: str | pathlib.Path, config: fdl.Config, stored: fdl.Config | None
) -> None:
    """Checks that `workdir` is the folder of `config` or can become it; makes it if missing.

    Args:
      workdir: the folder.
      config: the experiment to run.
      stored: the config that the folder holds, or None where it holds none.

    Raises:
      UserError: the folder holds another experiment or something else, or cannot be made.
    """
    folder = pathlib.Path(workdir)
    if stored is not None:
        different = [line for line in config_diff(stored, config).splitlines() if not _free(line)]
        before, now = code_of(stored), code_of(config)
        different += [
            f"{name}: another text" for name in before.keys() & now if before[name] != now[name]
        ]
        if different:
            raise UserError(
                f"{folder} holds another experiment ({'; '.join(different[:5])}"
                f"{'; ...' if len(different) > 5 else ''}): choose another workdir=..., or resume "
                f"that one with `moejax train {shlex.quote(str(folder))}`"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all(path.name.endswith(_PARTIAL) for path in folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and holds no {CONFIG_JSON}: choose another workdir=..."
            )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def claim(
    workdir: str | pathlib.Path,
    config: fdl.Config,
    versions: Mapping[str, str],
    *,
    read: Callable[[], fdl.Config],
) -> None:
    """Makes `workdir`, which `check_workdir` has accepted, the folder of `config`.

    A folder that already is one keeps its config, with what this session changes of `FREE`.

    Args:
      workdir: the folder.
      config: the experiment to run.
      versions: of libraries, recorded beside the config.
      read: the config that the folder holds once it is claimed, perhaps by another run that
        started at the same time.

    Raises:
      UserError: the config cannot be stored, the folder cannot be written, or another run took it.
    """
    folder = pathlib.Path(workdir)
    try:
        if not (folder / CONFIG_JSON).exists():
            _write(folder / CONFIG_JSON, dump_config(config, versions), give_name=_link)
        stored = read()
        check_workdir(folder, config, stored)
        if config_diff(stored, config):
            store(folder, config, versions)
        elif not (folder / CONFIG_TEXT).exists():
            _write(folder / CONFIG_TEXT, config_text(config), give_name=os.replace)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def store(folder: pathlib.Path, config: fdl.Config, versions: Mapping[str, str]) -> None:
    """Writes `config` to `folder`, with the versions of libraries, whatever it held before."""
    _write(folder / CONFIG_JSON, dump_config(config, versions), give_name=os.replace)
    _write(folder / CONFIG_TEXT, config_text(config), give_name=os.replace)


def _write(path: pathlib.Path, text: str, *, give_name: Callable) -> None:
    """Writes a file that has its name only once it is whole."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    give_name(partial, path)
    partial.unlink(missing_ok=True)


def _link(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the name unless another process was first, as far as the file system can tell."""
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(partial, path)


def _free(line: str) -> bool:
    path = line.partition(":")[0]
    return any(path == free or path.startswith(free + ".") for free in FREE)
