"""An H100 that exists as a description only, and the real GPU compiler for it.

Needs `pip install "jax[cuda13]"` (4.4 GB).
"""

import importlib.util

import jax
import pytest
from jax.experimental import topologies

from moejax.planning.topology import H100_TARGET

NEEDS_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='needs the GPU compiler: pip install "jax[cuda13]"',
)


@pytest.fixture(scope="module")
def mesh():
    """Four of them, described by what XLA asks the driver of a real one."""
    topology = topologies.get_topology_desc(
        topology_name="h100",
        platform="cuda",
        target_config=H100_TARGET.read_text(),
        topology="1x1x4",
    )
    jax.config.update("jax_enable_compilation_cache", False)  # what has no client cannot be read
    yield jax.sharding.Mesh(topology.devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def assembler(monkeypatch, tmp_path):
    """Returns what the assembler said of the kernels compiled since; fails if it said

    that products of the tensor cores wait for one another. It says so and goes on: a function
    call in a kernel (a division of 16-bit numbers is one) is enough, and costs most of the speed.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    reports = lambda: [file.read_text(errors="replace") for file in tmp_path.glob("*.ptxas")]
    yield reports
    for report in reports():
        assert "wgmma.mma_async instructions are serialized" not in report


def array(mesh, *shape, dtype="bfloat16"):
    on_one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=on_one)


def compile_for(mesh, function, *arguments):
    """The program compiled for one GPU."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*arguments)
    assert "mosaic_gpu" in lowered.as_text()
    return lowered.compile()
