"""What the processes of one run must have in common before they start; nothing for one process."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fiddle as fdl

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "fiddle")
_VISIBLE_SECONDS = 60.0  # network file systems show a new file late


def check_same_run(config: fdl.Config, **arguments: Any) -> None:
    """Raises UserError where processes differ in config, code, kernels, versions or `arguments`.

    The error names the process and the paths. Enter `processes.joined` before.
    """
    from moejax.train import processes, sameness

    if processes.num_processes() == 1:
        return
    from moejax.config.text import config_text

    facts = {f"the argument {name}": repr(value) for name, value in arguments.items()}
    facts |= _versions() | _code(config) | _kernels()
    lines = [f"{path} = {value}" for path, value in facts.items()]
    sameness.check_same("config or code", config_text(config) + "\n".join(lines))


def check_visible(path: pathlib.Path) -> None:
    """Raises UserError where a process does not see the file as the first one does."""
    from moejax.train import processes, sameness

    if processes.num_processes() == 1:
        return
    wanted = processes.exchange(_content(path), lambda all_: all_[0])
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while _content(path) != wanted and time.monotonic() < deadline:
        time.sleep(1)
    sameness.check_same("what they see of the workdir", f"{path} = {_content(path)}")


def _content(path: pathlib.Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return f"not readable ({error.strerror})"


def _versions() -> dict[str, str]:
    found = {"the version of python": platform.python_version()}
    for name in _PACKAGES:
        found[f"the version of {name}"] = importlib.metadata.version(name)
    return found


def _kernels() -> dict[str, str]:
    """What `moejax verify-kernels --accept` stored: processes must compile the same program."""
    from moejax.kernels import accepted, compat

    found = {
        f"the kernels accepted for {kernel} in {dtype}": json.dumps(products, sort_keys=True)
        for kernel, by_dtype in accepted.by_user(compat.target_device_kind()).items()
        for dtype, products in by_dtype.items()
    }
    return found or {"the kernels accepted": "none"}


def _code(config: fdl.Config) -> dict[str, str]:
    """A hash of every file of moejax, and of those of the user's own that the config names."""
    from moejax.config.serialize import dump_config

    package = pathlib.Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    found = {f"the file moejax/{p.relative_to(package).as_posix()}": _content(p) for p in files}
    sources = json.loads(dump_config(config, {}))["sources"]
    return found | {f"the file {s['path']}": s["sha256"][:16] for s in sources.values()}
