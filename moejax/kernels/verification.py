"""Runs the conformance kits on the device at hand, times what passed, and names the fastest."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.kernels.activations import silu
from moejax.kernels.expert_mlp import conformance as mlp_kit
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import implementations
from moejax.kernels.grouped_matmul.groups import LocalGroups

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_clamped")


@dataclasses.dataclass
class Result:
    """What one implementation did on operands of one dtype.

    Attributes:
      obstacle: why it cannot run here; then nothing else is known.
      num_checks: how many checks ran.
      failures: what was wrong, in words.
      is_dense: it computes every group for every row here and is never chosen.
      seconds: product -> seconds per call, summed over balanced and skewed groups.
    """

    implementation: str
    dtype: str
    obstacle: str | None = None
    num_checks: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    is_dense: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def may_be_chosen(self) -> bool:
        return self.obstacle is None and not self.failures and not self.is_dense


@dataclasses.dataclass(frozen=True)
class Timing:
    """The sizes that are timed: rows, inner and outer width, groups, rounds."""

    rows: int
    inner: int
    outer: int
    groups: int
    rounds: int


# About a layer of OLMoE-1B-7B at 8,192 tokens; on CPU what takes a moment.
ACCELERATOR = Timing(rows=65536, inner=2048, outer=1024, groups=64, rounds=10)
CPU = Timing(rows=2048, inner=256, outer=512, groups=16, rounds=5)


def verify(name: str, dtype: str) -> Result:
    """Every check of the kits on one implementation; an exception in one is a failure."""
    result = Result(name, dtype, implementations.obstacle(name, dtype))
    result.is_dense = implementations.is_dense(name)
    if result.obstacle is None:
        for check in _checks(name, dtype):
            result.num_checks += 1
            try:
                result.failures += map(str, check())
            except Exception as error:  # a kernel that does not compile here, say
                what = str(error).partition("\n")[0][:200]
                result.failures.append(f"{type(error).__name__}: {what}")
    return result


def _checks(name: str, dtype: str) -> Iterator[Callable[[], Iterable]]:
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


def time_products(results: list[Result], sizes: Timing) -> None:
    """Fills in `seconds` of those that may be chosen, all of one dtype, in alternation."""
    candidates = [result for result in results if result.may_be_chosen]
    for distribution in (_balanced(sizes), _skewed(sizes)):
        for product in implementations.Choice._fields:
            calls = {
                r.implementation: _call(r.implementation, product, r.dtype, sizes, distribution)
                for r in candidates
            }
            medians = _medians(calls, sizes.rounds)
            for r in candidates:
                so_far = r.seconds.get(product, 0.0)
                r.seconds[product] = so_far + medians[r.implementation]


def fastest(results: Iterable[Result]) -> dict[str, str]:
    """Product -> the fastest implementation that may be chosen; empty if there is none."""
    timed = [r for r in results if r.may_be_chosen and r.seconds]
    return {
        product: min(timed, key=lambda r: r.seconds[product]).implementation
        for product in (implementations.Choice._fields if timed else ())
    }


def _call(name: str, product: str, dtype: str, sizes: Timing, group_sizes: np.ndarray):
    """A compiled function without arguments that runs one product once."""
    lhs, rhs, up, dout = _data(sizes, dtype)
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


@functools.lru_cache(maxsize=1)
def _data(sizes: Timing, dtype: str) -> tuple[Array, Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    weight = (sizes.groups, sizes.inner, sizes.outer)
    shapes = ((sizes.rows, sizes.inner), weight, weight, (sizes.rows, sizes.outer))
    lhs, rhs, up, dout = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return lhs, rhs, up, dout


def _balanced(sizes: Timing) -> np.ndarray:
    share = np.full(sizes.groups, 1 / sizes.groups)
    return np.random.default_rng(0).multinomial(sizes.rows, share)


def _skewed(sizes: Timing) -> np.ndarray:
    share = 1 / np.arange(1, sizes.groups + 1)
    return np.random.default_rng(0).multinomial(sizes.rows, share / share.sum())


def _medians(calls: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call; they alternate, so that a slow moment hits all."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}
