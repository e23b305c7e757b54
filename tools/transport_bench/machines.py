"""The devices that programs are compiled for: simulated ones here, or TPUs that are not here."""

from __future__ import annotations

import jax

from moejax.planning.topology import parse

NUM_DEVICES = 8
TPU = "v5p:2x2x2"  # eight chips


def simulated() -> list[jax.Device]:
    """Eight of this CPU. To be called before anything else uses JAX."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    return jax.devices()


def described(topology: str = TPU) -> list[jax.Device]:
    """Those of a topology, for compiling only. Needs `pip install libtpu`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # there is no client to read it
    return parse(topology).devices()
