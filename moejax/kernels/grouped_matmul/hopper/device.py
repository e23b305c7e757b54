"""What the Hopper kernels assume of the device, and whether this is one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.kernels import compat

DTYPES = ("bfloat16", "float16")
SHARED_MEMORY_BYTES = 232448  # that one block can have, of compute capability 9.0
_MULTIPROCESSORS = 132  # H100 SXM, H200: where the compiler is given a device without a count
_SIMULATED_MULTIPROCESSORS = 3  # fewer than the tasks of a small test, so that each gets several


def obstacle(dtype: Any) -> str | None:
    """Why the Hopper kernels cannot serve operands of `dtype` here, or None."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        why = " (tensor cores would round it to tf32)" if name == "float32" else ""
        return f"it multiplies {' and '.join(DTYPES)}, not {name}{why}"
    if jax.__version_info__ < compat.GPU_KERNELS_SINCE:
        oldest = ".".join(map(str, compat.GPU_KERNELS_SINCE))
        return f"it needs jax {oldest} or newer, and this is {jax.__version__}"
    if compat.gpu_interpretation() is not None:
        return None
    if compat.target_platform() != "gpu":
        return f"it runs on NVIDIA Hopper GPUs, and this is {compat.target_platform()}"
    kind = compat.target_device_kind()
    if not any(chip in kind for chip in ("H100", "H200", "H800", "H20", "GH200")):
        return f"it runs on NVIDIA Hopper GPUs (compute capability 9.0), and this is {kind}"
    return None


def num_multiprocessors() -> int:
    """Multiprocessors of the device that code traced here is meant for."""
    if compat.gpu_interpretation() is not None:
        return _SIMULATED_MULTIPROCESSORS
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        device = jax.config.jax_default_device or jax.local_devices()[0]
    count = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    return count or _MULTIPROCESSORS
