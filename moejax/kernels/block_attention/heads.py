"""One head after another, so that only one head's rows and scores exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax

from moejax.kernels.block_attention.blocks import Blocks


def by_head(function: Callable, arrays: Any, blocks: Blocks) -> Any:
    """`function(arrays of one key head, blocks of one row)` for all key heads.

    The leaves of `arrays`, and of the result, are `[B, Hkv, ...]`.
    """

    def row(part: tuple) -> Any:
        arrays, blocks = part
        return lax.map(lambda head: function(head, blocks), arrays)

    return lax.map(row, (arrays, blocks))
