"""A run's folder holds its own config: enough to resume it, and to refuse another experiment."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import fiddle as fdl

from moejax.config.serialize import dump_config
from moejax.config.text import config_diff, config_text
from moejax.errors import UserError

CONFIG_JSON = "config.json"
CONFIG_TEXT = "config.txt"
_PARTIAL = CONFIG_JSON + ".partial"  # all that a process that was killed while it claimed can leave

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
        if different:
            raise UserError(
                f"{folder} holds another experiment ({'; '.join(different[:5])}"
                f"{'; ...' if len(different) > 5 else ''}): choose another workdir=..., or resume "
                f"that one with `moejax train {folder}`"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.name != _PARTIAL for path in folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and holds no {CONFIG_JSON}: choose another workdir=..."
            )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def claim(workdir: str | pathlib.Path, config: fdl.Config, versions: Mapping[str, str]) -> None:
    """Makes `workdir`, which `check_workdir` has accepted, the folder of `config`.

    Does nothing where it already is one. `versions` of libraries are recorded beside the config.

    Raises:
      UserError: the config cannot be stored, or the folder cannot be written.
    """
    folder = pathlib.Path(workdir)
    try:
        if not (folder / CONFIG_JSON).exists():
            partial = folder / _PARTIAL
            partial.write_text(dump_config(config, versions), encoding="utf-8")
            partial.rename(folder / CONFIG_JSON)  # from here on the folder is claimed
        if not (folder / CONFIG_TEXT).exists():
            partial = folder / (CONFIG_TEXT + ".partial")
            partial.write_text(config_text(config), encoding="utf-8")
            partial.rename(folder / CONFIG_TEXT)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _free(line: str) -> bool:
    path = line.partition(":")[0]
    return any(path == free or path.startswith(free + ".") for free in FREE)
