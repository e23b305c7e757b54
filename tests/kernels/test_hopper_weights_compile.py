"""The weight gradient passes the real GPU compiler at the sizes of published models, without a GPU.

Needs `pip install "jax[cuda13]"` (4.4 GB). It also shows what the simulator cannot: layouts, shared
memory, and whether the tensor cores' sums fit the registers.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from moejax.kernels.grouped_matmul.groups import LocalGroups

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the GPU compiler: pip install 'jax[cuda13]'",
    ),
]

# rows, inner width, outer width, groups: gate or up projection at 16,384 tokens.
SHAPES = {
    "Mixtral-8x7B": (32768, 4096, 14336, 8),
    "OLMoE-1B-7B": (131072, 2048, 1024, 64),
    "Qwen3-30B-A3B": (131072, 2048, 768, 128),
    "DeepSeek-V3, one of 8 devices": (131072, 7168, 2048, 32),
    "gpt-oss-120b": (65536, 2880, 2880, 128),
    "narrow swizzles": (4096, 304, 720, 4),
}
# What XLA asks of a GPU's description; figures of the H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture
def h100():
    """An H100 to compile for, and the abstract mesh that kernels read its kind from."""
    topology = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=H100, topology="1x1x1"
    )
    device = topology.devices[0]
    described = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=None, platform="cuda"
    )
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types, abstract_device=described)
    jax.config.update("jax_enable_compilation_cache", False)  # what has no client cannot be read
    with jax.sharding.use_abstract_mesh(mesh):
        yield jax.sharding.SingleDeviceSharding(device)
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_without_copies(h100, tmp_path, monkeypatch, name, transpose_rhs, dtype):
    from moejax.kernels.grouped_matmul.hopper import weights

    rows, inner, outer, groups = SHAPES[name]

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=h100)

    def gradient(lhs, dout, sizes):
        held = LocalGroups(sizes, 0)
        return weights.grad_rhs(lhs, dout, held, transpose_rhs=transpose_rhs, dtype=dtype)

    arguments = array(rows, inner), array(rows, outer), array(groups, dtype=jnp.int32)
    lowered = jax.jit(gradient).lower(*arguments)
    assert "mosaic_gpu" in lowered.as_text()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**16  # lists of groups, not operands
    reports = [f.read_text(errors="replace") for f in tmp_path.glob("*.ptxas")]
    same_as_before = transpose_rhs and inner == outer  # not compiled a second time
    assert reports or same_as_before
    for report in reports:
        assert " 0 bytes spill stores" in report  # the sums stay in registers
        assert "wgmma.mma_async instructions are serialized" not in report
