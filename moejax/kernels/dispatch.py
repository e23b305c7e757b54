"""Chooses the implementation of a kernel, for each of its products.

`implementation=None` always works and says once, through `logging`, what it took and why. A named
implementation is used or refused, never replaced.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from moejax.errors import UserError
from moejax.kernels import accepted, compat

_log = logging.getLogger(__name__)
_unannounced = contextvars.ContextVar("unannounced", default=False)

COMMAND = "moejax verify-kernels --accept"


class Portable(NamedTuple):
    """The implementation that serves every call and is taken where none was accepted; why it is."""

    name: str
    reason: str


def choose(
    kernel: str,
    named: str | None,
    available: Collection[str],
    *,
    products: tuple[str, ...],
    dtype: str,
    obstacle: Callable[[str], str | None],
    portable: Portable,
    acceptable: Collection[str] | None = None,
    caller: str | None = None,
) -> tuple[str, ...]:
    """The implementation of each product: `named` for all, or the best that has passed its tests.

    Platform and kind of device are read at trace time (`compat`) and not with
    `lax.platform_dependent`, which would trace and differentiate every branch of every call. Who
    lowers for a platform other than the default device's, without a mesh, names the implementation.

    Args:
      kernel: whose accepted results to use.
      named: what the caller asked for, or None.
      available: the implementations that this kernel has.
      products: what the kernel computes, e.g. ("forward", "grad_lhs").
      dtype: of the operands.
      obstacle: says why an implementation cannot serve this call, or None.
      portable: one of `available` that always can.
      acceptable: those that `verify-kernels` may accept for such operands here; None for all.
      caller: the public function's name, for messages; by default the kernel's.

    Raises:
      UserError: `named` is not one of `available`, or cannot serve.
    """
    caller = caller or kernel
    if named is None:
        device_kind = compat.target_device_kind()
        found = accepted.look_up(kernel, dtype, device_kind, products)
        names = _choose(found, available, products, obstacle, portable)
        if not _unannounced.get():
            what = f"{caller} ({dtype}): {_describe(products, names)} on {device_kind}"
            others = set(available if acceptable is None else acceptable) - {portable.name}
            if found:
                _announce(logging.INFO, f"{what}, {found.source}")
            # Asked only here: it imports every implementation.
            elif any(obstacle(name) is None for name in others):
                _advise(what, portable, device_kind)
            else:
                _announce(logging.INFO, f"{what}: no other can be accepted there")
        return names
    if named not in available:
        raise UserError(
            f"{caller} has no implementation {named!r}; use one of "
            f"{', '.join(sorted(available))}, or None to let it choose"
        )
    if (reason := obstacle(named)) is not None:
        raise UserError(f"{caller}: implementation {named!r} cannot serve this call: {reason}")
    return (named,) * len(products)


@contextlib.contextmanager
def unannounced() -> Iterator[None]:
    """Choices made within are not logged: for tracing something that will not run."""
    token = _unannounced.set(True)
    try:
        yield
    finally:
        _unannounced.reset(token)


def _choose(found, available, products, obstacle, portable) -> tuple[str, ...]:
    serves = lambda name: name in available and obstacle(name) is None
    names = []
    for product in products:
        name = found.choices.get(product, portable.name) if found else portable.name
        # What was accepted may be gone (an optional package) or not fit this call.
        names.append(name if serves(name) else portable.name)
    return tuple(names)


def _advise(what: str, portable: Portable, device_kind: str) -> None:
    """Warns that `COMMAND` may find something faster."""
    stale = accepted.is_stale(device_kind)
    known = "only other versions of them were" if stale else "none has been"
    _announce(
        logging.WARNING,
        f"{what}: {portable.reason}. Faster kernels may exist, but {known} accepted "
        f"on such a device; run {COMMAND} there",
    )


def _describe(products: tuple[str, ...], chosen: tuple[str, ...]) -> str:
    if len(set(chosen)) == 1:
        return f"implementation {chosen[0]!r}"
    return ", ".join(f"{p} by {name!r}" for p, name in zip(products, chosen, strict=True))


@functools.cache  # once per message
def _announce(level: int, message: str) -> None:
    _log.log(level, message)


def announce(level: int, message: str) -> None:
    """Logs a choice that was made elsewhere: once, and not within `unannounced`."""
    if not _unannounced.get():
        _announce(level, message)
