"""Chooses the implementation of a kernel.

`implementation=None` always works and says once, through `logging`, what it took and why. A named
implementation is used or refused, never replaced.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Collection, Iterator

from moejax.errors import UserError
from moejax.kernels import compat

_log = logging.getLogger(__name__)
_unannounced = contextvars.ContextVar("unannounced", default=False)


def choose(
    kernel: str,
    named: str | None,
    available: Collection[str],
    obstacle: Callable[[str], str | None] = lambda name: None,
) -> str:
    """The implementation to run: `named`, or the best one that has passed its tests here.

    The platform is read at trace time (`compat.target_platform`) and not with
    `lax.platform_dependent`, which would trace and differentiate every branch of every call. Who
    lowers for a platform other than the default device's, without a mesh, names the implementation.

    Args:
      kernel: the public function's name, for messages.
      named: what the caller asked for, or None.
      available: the implementations that this kernel has.
      obstacle: says why an implementation cannot serve this call, or None.

    Raises:
      UserError: `named` is not one of `available`, or cannot serve.
    """
    if named is None:
        name, reason = _default(compat.target_platform())
        if not _unannounced.get():
            _announce(f"{kernel}: implementation {name!r} on {reason}")
        return name
    if named not in available:
        raise UserError(
            f"{kernel} has no implementation {named!r}; use one of "
            f"{', '.join(sorted(available))}, or None to let it choose"
        )
    if (reason := obstacle(named)) is not None:
        raise UserError(f"{kernel}: implementation {named!r} cannot serve this call: {reason}")
    return named


@contextlib.contextmanager
def unannounced() -> Iterator[None]:
    """Choices made within are not logged: for tracing something that will not run."""
    token = _unannounced.set(True)
    try:
        yield
    finally:
        _unannounced.reset(token)


def _default(platform: str) -> tuple[str, str]:
    """The implementation to take on `platform`, and why."""
    if platform == "tpu":
        return "xla", "tpu: XLA's ragged dot is a real grouped kernel there"
    return "tile_scan", f"{platform}: XLA's ragged dot computes every group for every row there"


@functools.cache  # once per message
def _announce(message: str) -> None:
    _log.info(message)
