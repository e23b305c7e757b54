"""Chooses the implementation of a kernel.

`implementation=None` always works and says once, through `logging`, what it took and why. A named
implementation is used or refused, never replaced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection

from moejax.errors import UserError
from moejax.kernels import compat

_log = logging.getLogger(__name__)


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
        return _default(kernel, compat.target_platform())
    if named not in available:
        raise UserError(
            f"{kernel} has no implementation {named!r}; use one of "
            f"{', '.join(sorted(available))}, or None to let it choose"
        )
    if (reason := obstacle(named)) is not None:
        raise UserError(f"{kernel}: implementation {named!r} cannot serve this call: {reason}")
    return named


@functools.cache  # one log line per kernel and platform
def _default(kernel: str, platform: str) -> str:
    if platform == "tpu":
        name, reason = "xla", "XLA's ragged dot is a real grouped kernel on TPU"
    else:
        name, reason = (
            "tile_scan",
            f"XLA's ragged dot computes every group for every row on {platform}",
        )
    _log.info("%s: implementation %r on %s: %s", kernel, name, platform, reason)
    return name
