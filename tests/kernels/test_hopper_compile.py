"""The Hopper kernels pass the real GPU compiler at the sizes of published models, without a GPU."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from moejax.kernels.activations import GLU_ACTIVATIONS
from moejax.kernels.grouped_matmul.groups import LocalGroups

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins.xla_cuda13") is None
        if importlib.util.find_spec("jax_plugins")
        else True,
        reason='needs the GPU compiler: pip install "jax[cuda13]"',
    ),
]

# rows, inner width, outer width, groups: gate or up projection at 16,384 tokens, and back.
SHAPES = {
    "Mixtral-8x7B": (32768, 4096, 14336, 8),
    "Mixtral-8x7B, down": (32768, 14336, 4096, 8),
    "OLMoE-1B-7B": (131072, 2048, 1024, 64),
    "Qwen3-30B-A3B": (131072, 2048, 768, 128),
    "DeepSeek-V3, one of 8 devices": (131072, 7168, 2048, 32),
    "gpt-oss-120b": (65536, 2880, 2880, 128),
}
MOST_TEMPORARY_BYTES = 2**20  # lists of tasks, not operands


@pytest.fixture(scope="module")
def mesh():
    """Four H100s that exist as a description only: what XLA asks the driver of a real one."""
    topology = topologies.get_topology_desc(
        topology_name="h100",
        platform="cuda",
        target_config=pathlib.Path(__file__).with_name("h100_target.txtpb").read_text(),
        topology="1x1x4",
    )
    return jax.sharding.Mesh(topology.devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def compile_for(mesh, function, *shapes):
    """Compiles for one GPU; shapes of one number are group sizes."""
    on_one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    arguments = [
        jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 1 else jnp.bfloat16, sharding=on_one)
        for s in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*arguments)
    assert "mosaic_gpu" in lowered.as_text()
    return lowered.compile().memory_analysis()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_rows_compile_without_a_copy(mesh, name, transpose_rhs):
    from moejax.kernels.grouped_matmul.hopper import rows

    num_rows, inner, outer, groups = SHAPES[name]

    def products(lhs, rhs, sizes, dout):
        held = LocalGroups(sizes, 0)
        options = {"transpose_rhs": transpose_rhs, "dtype": jnp.bfloat16}
        return rows.forward(lhs, rhs, held, **options), rows.grad_lhs(dout, rhs, held, **options)

    matrix = (outer, inner) if transpose_rhs else (inner, outer)
    shapes = (num_rows, inner), (groups, *matrix), (groups,), (num_rows, outer)
    memory = compile_for(mesh, products, *shapes)
    assert memory.temp_size_in_bytes < MOST_TEMPORARY_BYTES


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if "down" not in name])
def test_glu_compiles_without_a_copy(mesh, name, biased):
    check_glu(mesh, SHAPES[name], GLU_ACTIVATIONS["silu"], biased)


@pytest.mark.parametrize("activation", [name for name in GLU_ACTIVATIONS if name != "silu"])
def test_every_activation_compiles(mesh, activation):
    check_glu(mesh, (4096, 512, 512, 8), GLU_ACTIVATIONS[activation], True)


def check_glu(mesh, shape, act, biased):
    from moejax.kernels.grouped_matmul.hopper.glu import glu

    num_rows, inner, outer, groups = shape

    def run(rows, gate, up, sizes, gate_bias, up_bias):
        biases = (gate_bias, up_bias) if biased else None
        return glu(rows, gate, up, biases, LocalGroups(sizes, 0), act=act)

    weight, bias = (groups, inner, outer), (groups, outer)
    memory = compile_for(mesh, run, (num_rows, inner), weight, weight, (groups,), bias, bias)
    assert memory.temp_size_in_bytes < MOST_TEMPORARY_BYTES


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_compile(mesh, dtype):
    """float16 operands and result, and a float32 result."""
    from moejax.kernels.grouped_matmul.hopper import rows

    def run(lhs, rhs, sizes):
        if dtype == jnp.float16:
            lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
        return rows.forward(lhs, rhs, LocalGroups(sizes, 0), transpose_rhs=False, dtype=dtype)

    compile_for(mesh, run, (4096, 512), (8, 512, 512), (8,))


@pytest.mark.parametrize("check_vma", [True, False])
def test_compiles_inside_shard_map(mesh, check_vma):
    """Rows sharded, weights replicated; the result is known to differ between devices."""
    from moejax.kernels.grouped_matmul import grouped_matmul

    def local(lhs, rhs, sizes):
        out, vjp = jax.vjp(
            lambda a, b: grouped_matmul(a, b, sizes.reshape(-1), implementation="hopper"), lhs, rhs
        )
        drhs = vjp(out)[1]
        return out, drhs if check_vma else jax.lax.psum(drhs, "x")

    shard, whole = jax.P("x"), jax.P()
    run = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(shard, whole, shard),
            out_specs=(shard, whole),
            check_vma=check_vma,
        )
    )
    struct = lambda shape, spec, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, spec)
    )
    with jax.set_mesh(mesh):
        lowered = run.lower(
            struct((4096, 512), shard), struct((8, 512, 512), whole), struct((4, 8), shard, "int32")
        )
    text = lowered.compile().as_text()
    assert "all-reduce" in text  # the weight gradient's sum over devices
    assert text.count("mosaic_gpu") >= 2
