"""Shuffles that need no memory and no state: position -> row, for any position at any time.

A permutation of `length` rows is a Feistel network over a grid of about sqrt(length) x
sqrt(length) cells (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It is
plain integer arithmetic, so the order of the data does not depend on a library's version.
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 4
_U64 = np.uint64


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scrambles all bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def keys(*values: int | np.ndarray) -> np.ndarray:
    """One well-mixed uint64 key from several integers; arrays broadcast."""
    key = np.zeros(1, _U64)
    for value in values:
        key = mix64(key * _U64(0x9E3779B97F4A7C15) + _as_u64(value) + _U64(1))
    return key


def permute(index: np.ndarray, length: int, key: np.ndarray) -> np.ndarray:
    """Where each index goes in the permutation of [0, length) that its key names.

    Args:
      index: integers [n] in [0, length).
      length: rows to permute.
      key: uint64 [n] or [1]; equal keys name the same permutation.

    Returns:
      int64 [n] in [0, length); distinct for distinct indices of one key.
    """
    wide = math.isqrt(max(length - 1, 0)) + 1
    high = -(-length // wide)
    out = _as_u64(index)
    key = np.broadcast_to(key, out.shape)
    out = _feistel(out, key, high, wide)
    # The grid has up to `wide` cells too many: whoever lands there walks on until back inside.
    while (outside := np.flatnonzero(out >= _U64(length))).size:
        out[outside] = _feistel(out[outside], key[outside], high, wide)
    return out.astype(np.int64)


def order(length: int, seed: int) -> np.ndarray:
    """A whole shuffle of [0, length) as int64 [length]."""
    return np.argsort(mix64(_as_u64(np.arange(length)) ^ keys(seed)), kind="stable")


def _feistel(x: np.ndarray, key: np.ndarray, high: int, wide: int) -> np.ndarray:
    rows, columns = _U64(high), _U64(wide)
    left, right = x // columns, x % columns
    for r in range(2 * _ROUNDS):
        round_key = key + _U64((r + 1) * 0x9E3779B97F4A7C15 % 2**64)
        if r % 2 == 0:
            left = (left + mix64(right + round_key) % rows) % rows
        else:
            right = (right + mix64(left + round_key) % columns) % columns
    return left * columns + right


def _as_u64(value: int | np.ndarray) -> np.ndarray:
    return np.atleast_1d(np.asarray(value)).astype(np.int64).astype(_U64)
