"""Builds the objects that a config describes."""

from __future__ import annotations

import re
from typing import Any

import fiddle as fdl

from moejax.config.check import check_config
from moejax.errors import UserError


def build_config(config: fdl.Config) -> Any:
    """Checks `config` and builds it.

    Raises:
      UserError: `check_config` finds something, or a component refuses its values; its path is
        named. fiddle's own report of the call would be longer than the sentence that matters.
    """
    check_config(config)
    try:
        return fdl.build(config)
    except UserError as error:
        cause = getattr(error, "proxy_base_exception", error)
        at = re.search(r" at <root>\.?(\S*) with ", getattr(error, "proxy_message", ""))
        path = _dotted(at.group(1)) if at else ""
        raise UserError(f"{path}: {cause}" if path else str(cause)) from cause


def _dotted(path: str) -> str:
    """fiddle's `sources[0].options['a']` as `sources.0.options.a`."""
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).lstrip(".")
