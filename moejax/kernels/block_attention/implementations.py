"""The implementations of block attention, and which of them computes each product.

An implementation is a module of this package with

    obstacle(dtype, block_size)               why it cannot serve, or None
    plan(targets, blocks, q)                  what its passes need of the choices
    forward(q, k, v, plan, blocks, *, scale)  -> (result, log-sum-exp)
    backward(q, k, v, out, lse, d_out, plan, blocks, *, scale)  -> (dq, dk, dv)

with queries `[B, Hkv, G, S, d]` and keys `[B, Hkv, M, d]`. Adding one is a file and its name here.
One that packs takes `packed_passes.py` and replaces `routed_tiles.py` alone.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp

from moejax.kernels import dispatch

IMPLEMENTATIONS = ("scan", "packed", "tpu")
PRODUCTS = ("forward", "backward")
DTYPES = ("float32", "bfloat16")  # for which the conformance kit has tolerances

# From so many times the keys that a query attends on, packing costs no more than computing every
# pair, and less with the gradients: measured on CPU (docs/benchmarks.md).
CROSSOVER = 2


class Choice(NamedTuple):
    """The implementation of each product."""

    forward: str
    backward: str


def choose(named: str | None, dtype: Any, *, num_keys: int, block_size: int, top_k: int) -> Choice:
    """`named` for both products, or what suits the length and the device.

    Raises:
      UserError: `named` is unknown or cannot serve.
    """
    seen = top_k * block_size
    serves = functools.partial(obstacle, dtype=dtype, block_size=block_size)
    options = {"products": PRODUCTS, "dtype": jnp.dtype(dtype).name, "obstacle": serves}
    if named is None and num_keys < CROSSOVER * seen:
        reason = f"of {num_keys} keys, few for {top_k} blocks of {block_size}"
        if num_keys <= seen:
            reason = f"of {num_keys} keys, all in {top_k} blocks of {block_size}"
        # Not the kernel of the accepted results, which were timed on long sequences.
        return Choice(
            *dispatch.choose(
                "block_attention of few keys",
                None,
                ("scan",),
                portable=dispatch.Portable("scan", reason),
                caller=f"moba_attention {reason}",
                **options,
            )
        )
    chosen = dispatch.choose(
        "block_attention",
        named,
        IMPLEMENTATIONS,
        portable=dispatch.Portable("packed", f"{num_keys} keys are many for {seen} that are seen"),
        caller="moba_attention",
        **options,
    )
    return Choice(*chosen)


def module(name: str) -> ModuleType:
    """The module of an implementation, imported when first used."""
    return importlib.import_module(f"moejax.kernels.block_attention.{name}")


def obstacle(name: str, dtype: Any, block_size: int) -> str | None:
    """Why the implementation cannot serve operands of `dtype` in such blocks here, or None."""
    return module(name).obstacle(dtype, block_size)
