"""Grouped matmul and the experts on it, as `moejax verify-kernels` checks and times them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.kernels import compat
from moejax.kernels.activations import silu
from moejax.kernels.expert_mlp import conformance as mlp_kit
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import implementations
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.implementations import (
    DTYPES,
    IMPLEMENTATIONS,
    is_dense,
    obstacle,
)

__all__ = ["DTYPES", "IMPLEMENTATIONS", "NAME", "PRODUCTS", "ROUNDS", "is_dense", "obstacle"]

NAME = "grouped_matmul"
PRODUCTS = implementations.Choice._fields
ROUNDS = 10

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_clamped")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed: rows, inner and outer width, groups."""

    rows: int
    inner: int
    outer: int
    groups: int


# About a layer of OLMoE-1B-7B at 8,192 tokens; on CPU what takes a moment.
ACCELERATOR = Sizes(rows=65536, inner=2048, outer=1024, groups=64)
CPU = Sizes(rows=2048, inner=256, outer=512, groups=16)


def checks(name: str, dtype: str) -> Iterator[Callable[[], Iterable]]:
    """One call for each case of the kits; it gives what is wrong."""
    module = implementations.module(name)
    check = functools.partial(kit.failures, module, dtype=dtype)
    for case in kit.CASES:
        for transpose_rhs in (False, True):
            yield functools.partial(check, case, transpose_rhs=transpose_rhs)
    for case in (*kit.OFFSET_CASES, *kit.SHAPE_CASES, *kit.WIDE_CASES):
        yield functools.partial(check, case)
    yield functools.partial(kit.differences_between_runs, module, kit.WIDE_CASES[0], dtype=dtype)
    glu = functools.partial(implementations.glu, name)
    for activation in ACTIVATIONS:
        for biased in (False, True):
            options = {"dtype": dtype, "activation": activation, "biased": biased}
            for case in (*kit.CASES[5:8], *kit.WIDE_CASES[: activation == "silu"]):
                yield functools.partial(kit.glu_failures, glu, case, **options)
            yield functools.partial(mlp_kit.failures, name, **options)


def sizes() -> str:
    """What is timed, in words."""
    s = _sizes()
    return f"{s.rows} rows, {s.inner} to {s.outer} wide, {s.groups} groups"


def workloads() -> tuple[np.ndarray, np.ndarray]:
    """Group sizes: balanced, and by Zipf's law."""
    groups = _sizes().groups
    balanced, zipf = np.full(groups, 1 / groups), 1 / np.arange(1, groups + 1)
    draw = functools.partial(np.random.default_rng(0).multinomial, _sizes().rows)
    return draw(balanced), draw(zipf / zipf.sum())


def call(name: str, product: str, dtype: str, group_sizes: np.ndarray) -> Callable:
    """A compiled function without arguments that runs one product once."""
    lhs, rhs, up, dout = _data(_sizes(), dtype)
    module = implementations.module(name)
    options = {"transpose_rhs": False, "dtype": dtype}
    products: Mapping[str, tuple[Callable[..., Array | tuple[Array, ...]], tuple[Array, ...]]] = {
        "forward": (lambda g, a, b: module.forward(a, b, g, **options), (lhs, rhs)),
        "grad_lhs": (lambda g, a, b: module.grad_lhs(a, b, g, **options), (dout, rhs)),
        "grad_rhs": (lambda g, a, b: module.grad_rhs(a, b, g, **options), (lhs, dout)),
        "glu": (
            lambda g, *a: implementations.glu(name, *a, None, g, act=silu),
            (lhs, rhs, up),
        ),
    }
    function, arguments = products[product]
    run = jax.jit(lambda n, *a: function(LocalGroups(n, 0), *a))
    return functools.partial(run, jnp.asarray(group_sizes, jnp.int32), *arguments)


def _sizes() -> Sizes:
    return CPU if compat.target_platform() == "cpu" else ACCELERATOR


@functools.lru_cache(maxsize=1)
def _data(sizes: Sizes, dtype: str) -> tuple[Array, Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    weight = (sizes.groups, sizes.inner, sizes.outer)
    shapes = ((sizes.rows, sizes.inner), weight, weight, (sizes.rows, sizes.outer))
    lhs, rhs, up, dout = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return lhs, rhs, up, dout
