"""A 64-bit fingerprint of every leaf of a pytree, independent of how the leaf is laid out.

Each element's bit pattern goes through a bijection of 32-bit words that is keyed by the element's
position in the whole array, and the results are added modulo 2**32; two independent such sums make
64 bits. What that guarantees:

- **Exact under any sharding, mesh or process count**: wrap-around integer addition does not depend
  on order, and positions are those in the global array.
- **Any change within one word is visible with certainty**, one flipped bit included: the
  bijection maps different words to different words, so the sum changes by a non-zero amount, in
  both halves.
- Other changes go unnoticed with a chance of about 2**-64. The plain "bit pattern times odd
  position hash" lacks this: it shows every single flip, but flipping the sign bits of any two
  elements changes it by 2**31 * (odd +- odd) = 0, so a negated pair would pass.

Everything runs on the device that holds the data; only two words per leaf come to the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels import compat
from moejax.types import named_leaves

# Odd constants, two per half: one multiplies the position, one the keyed word.
_HALVES = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))
_ROW, _BLOCK = 1024, 2**20  # elements that are looked at together, and by one call


def fingerprints(tree: Any) -> dict[str, str]:
    """{path: 16 hexadecimal digits} for every leaf; blocks until the values are there.

    Leaves are arrays of any dtype of 8, 16, 32 or 64 bits (complex and sub-byte integers too), or
    typed PRNG keys, whose key data counts. Shape and dtype are not part of the fingerprint.
    Each leaf's value must be the same on all devices that hold a copy.
    """
    return start_fingerprints(tree)()


def start_fingerprints(tree: Any) -> Callable[[], dict[str, str]]:
    """Starts to compute what `fingerprints` returns; the result, called, waits for it.

    The leaves may be donated at once: what was started has them as they are now.
    """
    leaves = {path: jnp.asarray(x) for path, x in named_leaves(tree).items()}
    paths, started = tuple(leaves), [_sums(group) for group in _by_devices(leaves)]

    def finish() -> dict[str, str]:
        words: dict[str, np.ndarray] = {}
        for group in jax.device_get(started):
            words |= group
        return {path: digits(words[path]) for path in paths}

    return functools.cache(finish)


def digits(words: np.ndarray) -> str:
    """The two words of a fingerprint as 16 hexadecimal digits."""
    return "".join(f"{int(word):08x}" for word in words)


def run_words(values: np.ndarray, start: int) -> np.ndarray:
    """What a run of elements adds to the words of its array's fingerprint, uint32 [2].

    The run begins at row-major position `start` of the whole array. Words of runs that together
    are the whole, each element once, add up (modulo 2**32) to its words. Computed on the host's
    processor, block by block, with one compilation for every dtype.
    """
    size = values.dtype.itemsize
    bits = values.reshape(-1).view(f"u{min(size, 4)}")  # two words for an element of 64 bits
    start, words = start * max(size // 4, 1), np.zeros(2, np.uint32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for at in range(0, bits.size, _BLOCK):
            block = bits[at : at + _BLOCK]
            padded = block if block.size == _BLOCK else np.pad(block, (0, _BLOCK - block.size))
            first = np.uint32((start + at) % 2**32)
            words += np.asarray(_compiled()(padded, first, np.int32(block.size)))
    return words


@functools.cache
def _compiled() -> Callable[..., jax.Array]:
    return jax.jit(_block_words, compiler_options=compat.compiler_options())


def _block_words(block: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """The words of the first `count` elements of a block of unsigned integers."""
    rows = block.reshape(-1, _ROW)

    def add_row(row: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place = row * _ROW + jnp.arange(_ROW)
        positions = start + place.astype(jnp.uint32)
        words = rows[row].astype(jnp.uint32)
        keyed = (jnp.where(place < count, _keyed(words, positions, half), 0) for half in _HALVES)
        return tuple(map(jnp.add, sums, keyed))

    # A sum for each half: stacked, jax 0.10 takes 17 times as long.
    none = (jnp.zeros(_ROW, jnp.uint32),) * len(_HALVES)
    sums = jax.lax.fori_loop(0, rows.shape[0], add_row, none)
    return jnp.stack([half.sum(dtype=jnp.uint32) for half in sums])


def _by_devices(leaves: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
    """Groups leaves that one computation may take: those on the same devices."""
    groups: dict[Any, dict[str, jax.Array]] = {}
    for path, leaf in leaves.items():
        groups.setdefault(frozenset(leaf.sharding.device_set), {})[path] = leaf
    return list(groups.values())


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(fingerprint_words, leaves)


def fingerprint_words(x: jax.Array) -> jax.Array:
    """The two 32-bit words of one array's fingerprint, uint32 [2]. Pure; runs under jit."""
    words = _as_words(x)
    positions = _positions(words.shape)
    keyed = tuple(_keyed(words, positions, half) for half in _HALVES)
    # Both sums in one pass: of two, XLA would store what they share, which is twice the array, and
    # take 20 times as long on CPU.
    none = (np.uint32(0), np.uint32(0))
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce(keyed, none, add, tuple(range(words.ndim))))


def _as_words(x: jax.Array) -> jax.Array:
    """The bit patterns of `x` as uint32: its shape, plus an axis of 2 for 64-bit elements."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else None
    bits = bits or jnp.iinfo(x.dtype).bits
    if bits < 8:
        return x.astype(jnp.int8).astype(jnp.uint32)
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _keyed(words: jax.Array, positions: jax.Array, half: tuple[int, int]) -> jax.Array:
    """Each word through the bijection of its position."""
    spread, stir = (np.uint32(c) for c in half)
    # Multiplying by an odd number, xor with a constant and xor with an own shift are bijections.
    return _scramble((words ^ _scramble(positions * spread + stir)) * stir)


def _scramble(word: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3 (public domain): a bijection in which bits mix."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """Each element's row-major index modulo 2**32, built from iotas, which shard with the data."""
    strides = [math.prod(shape[d + 1 :]) % 2**32 for d in range(len(shape))]
    iotas = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, d) * np.uint32(stride)
        for d, stride in enumerate(strides)
    ]
    return functools.reduce(jnp.add, iotas, jnp.zeros(shape, jnp.uint32))
