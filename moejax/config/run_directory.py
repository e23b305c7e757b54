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

# What may change between two sessions of one run: nothing that reaches a gradient.
FREE = (
    "checkpoint_every",
    "data.cache_dir",
    "eval_every",
    "keep_every",
    "keep_last",
    "log_every",
    "prompts",
    "sampling",
    "workdir",
)


def claim(
    workdir: str | pathlib.Path,
    config: fdl.Config,
    stored: fdl.Config | None,
    versions: Mapping[str, str],
) -> None:
    """Makes `workdir` the folder of `config`, or checks that it already is.

    Args:
      workdir: the folder; made if it does not exist.
      config: the experiment to run.
      stored: the config that the folder holds, or None where it holds none.
      versions: library versions, recorded beside the config.

    Raises:
      UserError: the folder holds another experiment, or cannot be written.
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
        if any(folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and holds no {CONFIG_JSON}: choose another workdir=..."
            )
        # The JSON file comes last: its presence means that the folder is claimed.
        (folder / CONFIG_TEXT).write_text(config_text(config), encoding="utf-8")
        partial = folder / (CONFIG_JSON + ".partial")
        partial.write_text(dump_config(config, versions), encoding="utf-8")
        partial.rename(folder / CONFIG_JSON)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _free(line: str) -> bool:
    path = line.partition(":")[0]
    return any(path == free or path.startswith(free + ".") for free in FREE)
