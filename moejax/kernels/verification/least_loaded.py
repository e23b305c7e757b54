"""The least-loaded plan, as `moejax verify-kernels` checks and times it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels import least_loaded
from moejax.kernels.least_loaded import IMPLEMENTATIONS, PRODUCTS, conformance

__all__ = ["DTYPES", "IMPLEMENTATIONS", "NAME", "PRODUCTS", "ROUNDS"]

NAME = "least_loaded"
DTYPES = ("int32",)
ROUNDS = 20

_EXPERTS, _DEVICES = 256, 64  # DeepSeek-V3's, four to a device; a plan needs no such devices
_ROWS = _DEVICES * 65536
_LIMITS = {"capacity": 21 * _ROWS // (20 * _DEVICES), "min_chunk": 1024}  # 1.05 times the mean


def obstacle(name: str, dtype: str) -> str | None:
    """Why the implementation cannot serve here, or None."""
    del dtype  # there is one
    return least_loaded.obstacle(name)


def is_dense(name: str) -> bool:
    """No plan computes what it need not."""
    del name
    return False


def checks(name: str, dtype: str) -> Iterator[Callable[[], Iterable]]:
    """One call for each case of the kit; it gives what is wrong."""
    del dtype
    for case in conformance.CASES:
        yield functools.partial(conformance.failures, name, (case,))


def sizes() -> str:
    """What is timed, in words."""
    return f"{_EXPERTS} experts on {_DEVICES} devices"


def workloads() -> tuple[np.ndarray, np.ndarray]:
    """Loads `[E]`: nothing or little to move, and every device too full or too empty."""
    rng = np.random.default_rng(0)
    share = rng.permutation(1 / np.arange(1, _EXPERTS + 1))
    balanced = np.full(_EXPERTS, 1 / _EXPERTS)
    return rng.multinomial(_ROWS, balanced), rng.multinomial(_ROWS, share / share.sum())


def call(name: str, product: str, dtype: str, loads: np.ndarray) -> Callable:
    """A compiled function without arguments that makes one plan."""
    del product  # there is one
    plan = functools.partial(least_loaded.least_loaded_plan, implementation=name, **_LIMITS)
    run = jax.jit(plan, static_argnums=1)
    return functools.partial(run, jnp.asarray(loads, dtype), _DEVICES)
