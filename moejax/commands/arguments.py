"""The arguments that commands share: a config, `path=value` overrides, `--trust-config`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from moejax.errors import UserError

if TYPE_CHECKING:
    import fiddle as fdl

    from moejax.evaluation.open_model import Opened
    from moejax.parallel.mesh import Mesh


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds CONFIG, overrides and `--trust-config`; read them with `config_from`."""
    parser.add_argument(
        "config",
        nargs=None if required else "?",
        metavar="CONFIG[:function]",
        help="a config file such as configs/tiny.py or configs/tiny.py:smoke, or a run's folder",
    )
    add_override_arguments(parser)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds overrides and `--trust-config`, for commands that take their config from elsewhere."""
    parser.add_argument(
        "overrides",
        metavar="path=value",
        nargs="*",
        help="changes to the config, such as steps=50 workdir=runs/a model.block.ffn.router.k=2 "
        "or model.block.ffn.router=my_router.py:MyRouter",
    )
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="let a run's config.json name any code, not only moejax's and unchanged files",
    )


def config_from(args: argparse.Namespace) -> fdl.Config:
    """The config that the arguments name, with its overrides, checked.

    A run's folder that was moved, or comes from elsewhere, is still its own workdir.

    Raises:
      UserError: see `load_config`, `apply_overrides` and `check_config`.
    """
    from moejax.commands.given_model import complete
    from moejax.config.check import check_config
    from moejax.config.load import load_config
    from moejax.config.overrides import apply_overrides

    if "=" in args.config and not os.path.exists(args.config):
        raise UserError(f"the config comes before its overrides: CONFIG {args.config}")
    config = load_config(args.config, trusted=args.trust_config)
    if os.path.isdir(args.config) and hasattr(config, "workdir"):
        config.workdir = args.config
    config = complete(config, args.overrides, trusted=args.trust_config)
    return check_config(apply_overrides(config, args.overrides))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, `--step`, `--mesh` and `--trust-config`; read them with `opened`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="workdir of a training run, a folder that `moejax import-hf` wrote, or a Hugging Face "
        "checkpoint",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="of a run: this checkpoint, not the newest valid one"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="split the model over devices, for example fsdp=8 (default: one device)",
    )
    parser.add_argument("--trust-config", action="store_true", help="see `moejax train --help`")


def opened(args: argparse.Namespace) -> Opened:
    """The model that the arguments name, with its variables.

    Raises:
      UserError: no such model, no usable checkpoint, no such mesh, or a config that is not trusted.
    """
    from moejax.evaluation.open_model import open_model

    use_compilation_cache()
    mesh = None if args.mesh is None else _mesh(args.mesh)
    return open_model(args.model, step=args.step, mesh=mesh, trusted=args.trust_config)


def _mesh(text: str) -> Mesh:
    from moejax.parallel.mesh import AXES, Mesh

    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal():
            raise UserError(f"--mesh {text}: {part!r} is not AXIS=N with one of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return Mesh(**sizes)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, so that a second start takes seconds."""
    import jax

    folder = os.environ.get("MOEJAX_CACHE") or "~/.cache/moejax"
    jax.config.update(
        "jax_compilation_cache_dir", os.path.join(os.path.expanduser(folder), "compiled")
    )
