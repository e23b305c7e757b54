"""The matmul peak of the device, for "share of peak".

Accelerators: the vendor's dense bf16 figure by device kind. CPUs have no such figure, so theirs
is measured: the best of a few float32 products, on the machine and with the library in use.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s per device as JAX counts them; sources: the vendors' data sheets.
KNOWN = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops() -> float | None:
    """FLOP/s over all devices of this process's mesh, or None where the kind is not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measure_matmul()
    matches = [kind for kind in KNOWN if device.device_kind.startswith(kind)]
    if not matches:
        return None
    return KNOWN[max(matches, key=len)] * jax.device_count()


def measure_matmul(width: int = 2048, repeats: int = 5) -> float:
    """The best float32 rate of a `width`^3 product, in FLOP/s; takes about half a second."""
    a = jnp.ones((width, width), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return 2 * width**3 / min(times)
