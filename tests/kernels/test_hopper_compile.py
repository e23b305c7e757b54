"""The Hopper kernels pass the real GPU compiler at the sizes of published models, without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels.activations import GLU_ACTIVATIONS
from moejax.kernels.grouped_matmul.groups import LocalGroups
from tests.kernels import h100, model_shapes
from tests.kernels.h100 import assembler, mesh  # noqa: F401 - fixtures

pytestmark = [pytest.mark.aot, h100.NEEDS_COMPILER, pytest.mark.usefixtures("assembler")]

SHAPES = model_shapes.SHAPES | {"Mixtral-8x7B, down": (32768, 14336, 4096, 8)}
MOST_TEMPORARY_BYTES = 2**20  # lists of tasks, not operands


def compile_for(mesh, function, *shapes):  # noqa: F811
    """Memory of the program; shapes of one number are group sizes."""
    arguments = [h100.array(mesh, *s, dtype="int32" if len(s) == 1 else "bfloat16") for s in shapes]
    return h100.compile_for(mesh, function, *arguments).memory_analysis()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_rows_compile_without_a_copy(mesh, name, transpose_rhs):  # noqa: F811
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
def test_glu_compiles_without_a_copy(mesh, name, biased):  # noqa: F811
    check_glu(mesh, SHAPES[name], GLU_ACTIVATIONS["silu"], biased)


@pytest.mark.parametrize("activation", [name for name in GLU_ACTIVATIONS if name != "silu"])
def test_every_activation_compiles(mesh, activation):  # noqa: F811
    check_glu(mesh, (4096, 512, 512, 8), GLU_ACTIVATIONS[activation], True)


def check_glu(mesh, shape, act, biased):  # noqa: F811
    from moejax.kernels.grouped_matmul.hopper.glu import glu

    num_rows, inner, outer, groups = shape

    def run(rows, gate, up, sizes, gate_bias, up_bias):
        biases = (gate_bias, up_bias) if biased else None
        return glu(rows, gate, up, biases, LocalGroups(sizes, 0), act=act)

    weight, bias = (groups, inner, outer), (groups, outer)
    memory = compile_for(mesh, run, (num_rows, inner), weight, weight, (groups,), bias, bias)
    assert memory.temp_size_in_bytes < MOST_TEMPORARY_BYTES


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_compile(mesh, dtype):  # noqa: F811
    """float16 operands and result, and a float32 result."""
    from moejax.kernels.grouped_matmul.hopper import rows

    def run(lhs, rhs, sizes):
        if dtype == jnp.float16:
            lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
        return rows.forward(lhs, rhs, LocalGroups(sizes, 0), transpose_rhs=False, dtype=dtype)

    compile_for(mesh, run, (4096, 512), (8, 512, 512), (8,))


@pytest.mark.parametrize("check_vma", [True, False])
def test_compiles_inside_shard_map(mesh, check_vma):  # noqa: F811
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
