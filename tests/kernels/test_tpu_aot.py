"""The TPU kernels pass the real TPU compiler at the sizes of published models, without a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from moejax.kernels.grouped_matmul import grouped_matmul

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]

# rows, inner width, outer width, groups: gate or up projection at 16,384 tokens.
SHAPES = {
    "Mixtral-8x7B": (32768, 4096, 14336, 8),
    "OLMoE-1B-7B": (131072, 2048, 1024, 64),
    "Qwen3-30B-A3B": (131072, 2048, 768, 128),
    "DeepSeek-V3, one of 8 devices": (131072, 7168, 2048, 32),
    "gpt-oss-120b": (65536, 2880, 2880, 128),
}
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.fixture(params=TOPOLOGIES)
def mesh(request, monkeypatch):
    # Without these libtpu asks the network which TPU it is on.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
    axis_types = (jax.sharding.AxisType.Auto,)
    jax.config.update("jax_enable_compilation_cache", False)  # what has no client cannot be read
    yield jax.sharding.Mesh(topology.devices[:1], ("x",), axis_types=axis_types)
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("name", SHAPES)
def test_all_products_compile_without_copies(mesh, name):
    rows, inner, outer, groups = SHAPES[name]
    whole = jax.NamedSharding(mesh, jax.P())

    def layout(*shape):
        # Row by row, as the kernels read and write: left to itself, the compiler may choose another
        # layout for a program's arguments and results, and then has to copy them.
        return Format(Layout(tuple(range(len(shape)))), whole)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout(*shape))

    def products(lhs, rhs, sizes, dout):
        out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, implementation="tpu"), lhs, rhs)
        return out, *vjp(dout)

    arguments = (
        array(rows, inner),
        array(groups, inner, outer),
        array(groups, dtype=jnp.int32),
        array(rows, outer),
    )
    results = tuple(layout(*a.shape) for a in (arguments[3], arguments[0], arguments[1]))
    with jax.set_mesh(mesh):
        lowered = jax.jit(products, out_shardings=results).lower(*arguments)
    text = lowered.as_text()
    assert text.count("tpu_custom_call") >= 3
    assert f"{groups}x{rows}x{inner}" not in text
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**25  # lists of visits, not operands
