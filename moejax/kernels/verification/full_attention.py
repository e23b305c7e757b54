"""Full attention, as `moejax verify-kernels` checks and times it.

An implementation need not serve every call: it is checked in the cases that it serves, and is taken
only for calls that it serves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import Array

from moejax.kernels import compat, full_attention
from moejax.kernels.full_attention import DTYPES, IMPLEMENTATIONS, PRODUCTS, conformance

__all__ = ["DTYPES", "IMPLEMENTATIONS", "NAME", "PRODUCTS", "ROUNDS"]

NAME = "full_attention"
ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed, forward and backward: rows of one segment, which all serve."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int


# About a layer of Mixtral-8x7B; on CPU what takes a moment.
ACCELERATOR = Sizes(batch=4, length=4096, heads=32, kv_heads=8, width=128)
CPU = Sizes(batch=2, length=256, heads=4, kv_heads=2, width=64)


def obstacle(name: str, dtype: str) -> str | None:
    """Why the implementation cannot serve the plainest call here, or None."""
    q, k, v, _ = _data(Sizes(1, 128, 1, 1, 64), dtype)
    call = full_attention.Call(
        segment_ids=None, sinks=None, window=None, soft_cap=None, scale=1.0, q_offset=0
    )
    return full_attention.obstacle(name, q, k, v, call)


def is_dense(name: str) -> bool:
    """The definition holds all scores at once."""
    return name == "reference"


def checks(name: str, dtype: str) -> Iterator[Callable[[], Iterable]]:
    """One call for each case that the implementation serves; it gives what is wrong."""
    for case in conformance.CASES:
        if conformance.serves(name, case, dtype):
            yield functools.partial(conformance.failures, name, (case,), dtype)


def sizes() -> str:
    """What is timed, in words."""
    s = _sizes()
    return f"{s.batch} x {s.length} positions, {s.heads} heads of {s.width} on {s.kv_heads}"


def workloads() -> tuple[Sizes]:
    """One: what attention costs does not depend on values."""
    return (_sizes(),)


def call(name: str, product: str, dtype: str, sizes: Sizes) -> Callable:
    """A compiled function without arguments: the result and the gradients, once."""
    del product  # there is one
    q, k, v, cotangent = _data(sizes, dtype)

    @jax.jit
    def run(q: Array, k: Array, v: Array, cotangent: Array) -> tuple[Array, ...]:
        attend = functools.partial(full_attention.full_attention, implementation=name)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    return functools.partial(run, q, k, v, cotangent)


def _sizes() -> Sizes:
    return CPU if compat.target_platform() == "cpu" else ACCELERATOR


@functools.lru_cache(maxsize=1)
def _data(sizes: Sizes, dtype: str) -> tuple[Array, Array, Array, Array]:
    heads = sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads
    keys = jax.random.split(jax.random.key(0), 4)
    shape = lambda n: (sizes.batch, sizes.length, n, sizes.width)
    q, k, v, cotangent = (
        jax.random.normal(key, shape(n), jnp.dtype(dtype))
        for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v, cotangent
