"""Clocks, ceilings and the record of the machine, for `bench_kernels.py`."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE_BYTES = 4 * 50e6  # four times an H100's L2; more than the last level of most CPUs
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "XLA_", "LD_PRELOAD", "OMP_", "JAX_PLATFORMS")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured on this device: FLOP/s of a large matmul, bytes/s (read + written) of a copy."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline: no version that does this work can be faster."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure_ceilings(dtype: str) -> Ceilings:
    """A few seconds: the best of several large matmuls and of several large copies."""
    n, elements = (2048, 1 << 25) if jax.default_backend() == "cpu" else (8192, 1 << 29)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    product = compiled(jnp.dot, (a, b), {})
    long = jnp.tile(a.reshape(-1), elements // a.size)
    copy = compiled(lambda x: x + 1, (long,), {})
    best = lambda call, args: min(time_calls(call, [args], 3) for _ in range(4))
    moved = 2 * long.nbytes
    return Ceilings(2 * n**3 / best(product, (a, b)), moved / best(copy, (long,)))


def compiled(function: Callable, args: Sequence[Any], options: dict) -> jax.stages.Compiled:
    """`function` compiled for arguments like `args`."""
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    return jax.jit(function).lower(*specs).compile(compiler_options=options or None)


def time_calls(
    call: Callable, arguments: Sequence[tuple], repeats: int, wait: Callable = jax.block_until_ready
) -> float:
    """Seconds a call, over `repeats` calls in a row that take turns through `arguments`.

    A call before short ones is not timed: another library's threads may still be spinning.
    """
    if repeats > 1:
        wait(call(*arguments[-1]))
    start = time.perf_counter()
    for i in range(repeats):
        out = call(*arguments[i % len(arguments)])
    wait(out)
    return (time.perf_counter() - start) / repeats


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of the seconds of several rounds."""

    median: float
    least: float
    quartiles: float  # between the first and the third
    runs: int


def spread(seconds: Sequence[float]) -> Spread:
    """Median, minimum and interquartile range."""
    range_ = 0.0
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        range_ = high - low
    return Spread(statistics.median(seconds), min(seconds), range_, len(seconds))


def machine() -> dict[str, Any]:
    """What a result depends on and a reader needs: device, versions, commit, settings."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "torch", "tokamax", "jax-triton", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device_kind": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": (_git("status", "--porcelain", "--", "moejax", "tools") or "").split("\n"),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ALLOCATOR)},
    }


def _processor() -> str | None:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), None)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Output of a git command here; None where there is no git or no repository."""
    try:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
