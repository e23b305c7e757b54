"""Block attention, as `moejax verify-kernels` checks and times it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

from moejax.kernels import compat
from moejax.kernels.block_attention import conformance, implementations
from moejax.kernels.block_attention.implementations import DTYPES, IMPLEMENTATIONS, PRODUCTS
from moejax.kernels.block_attention.operands import make_operands

__all__ = ["DTYPES", "IMPLEMENTATIONS", "NAME", "PRODUCTS", "ROUNDS"]

NAME = "block_attention"
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed: keys and queries, query and key heads, their width, blocks."""

    keys: int
    num_heads: int
    kv_heads: int
    width: int
    block_size: int
    top_k: int


ACCELERATOR = Sizes(32768, num_heads=16, kv_heads=4, width=128, block_size=128, top_k=8)
CPU = Sizes(4096, num_heads=2, kv_heads=1, width=64, block_size=64, top_k=4)


def obstacle(name: str, dtype: str) -> str | None:
    """Why the implementation cannot serve here, or None."""
    return implementations.obstacle(name, dtype, _sizes().block_size)


def is_dense(name: str) -> bool:
    """`scan` computes every pair, as full attention does, and may be the fastest where it does."""
    del name
    return False


def checks(name: str, dtype: str) -> Iterator[Callable[[], Iterable]]:
    """One call for each case of the kit in blocks that it serves; it gives what is wrong."""
    for case in conformance.CASES:
        if implementations.obstacle(name, dtype, case.block_size) is None:
            yield functools.partial(conformance.failures, name, case, dtype=dtype)


def sizes() -> str:
    """What is timed, in words."""
    s = _sizes()
    return (
        f"{s.keys} keys, {s.num_heads} heads on {s.kv_heads}, {s.width} wide, {s.top_k} blocks of "
        f"{s.block_size}"
    )


def workloads() -> tuple[float, float]:
    """How much all queries prefer the first block: not at all, and beyond everything."""
    return 0.0, 10.0


def call(name: str, product: str, dtype: str, preference: float) -> Callable:
    """A compiled function without arguments: choose and attend, or the gradients of attending."""
    s, module = _sizes(), implementations.module(name)
    scale = 1 / math.sqrt(s.width)
    q, k, v, d_out = _data(s, dtype)
    q = q.at[..., 0].set(jnp.where(preference > 0, preference, q[..., 0]))
    k = k.at[:, : s.block_size, :, 0].add(preference)

    def forward(q, k, v):
        taken = make_operands(q, k, v, None, 0, block_size=s.block_size, top_k=s.top_k)
        plan = module.plan(taken.targets, taken.blocks, taken.q)
        passed = (*taken[:3], plan, taken.blocks)
        return module.forward(*passed, scale=scale), passed

    if product == "forward":
        return functools.partial(jax.jit(lambda *a: forward(*a)[0]), q, k, v)
    (out, lse), (*arrays, plan, blocks) = jax.jit(forward)(q, k, v)
    shape = (1, s.keys, s.kv_heads, -1, s.width)
    d_out = jnp.moveaxis(d_out.reshape(shape), 1, 3)
    # The blocks' static part passes through jit with them.
    backward = jax.jit(functools.partial(module.backward, scale=scale))
    return functools.partial(backward, *arrays, out.astype(q.dtype), lse, d_out, plan, blocks)


def _sizes() -> Sizes:
    return CPU if compat.target_platform() == "cpu" else ACCELERATOR


def _data(sizes: Sizes, dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = sizes.num_heads, sizes.kv_heads, sizes.kv_heads, sizes.num_heads
    return [
        jax.random.normal(key, (1, sizes.keys, n, sizes.width), dtype)
        for key, n in zip(keys, heads, strict=True)
    ]
