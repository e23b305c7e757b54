"""The devices that programs are compiled for: simulated ones here, or TPUs that are not here."""

from __future__ import annotations

import os

import jax

NUM_DEVICES = 8
TPU = "v5p:2x2x2"  # eight chips


def simulated() -> list[jax.Device]:
    """Eight of this CPU. To be called before anything else uses JAX."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    return jax.devices()


def described(topology: str = TPU) -> list[jax.Device]:
    """Those of a TPU topology, for compiling only. Needs `pip install libtpu`."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # there is no client to read it
    # Without these libtpu asks the network which TPU it is on, and refuses a second process.
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
