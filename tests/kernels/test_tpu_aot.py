"""The TPU kernels pass the real TPU compiler at the sizes of published models, without a TPU."""

import base64
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from moejax.kernels import compat
from moejax.kernels.activations import GLU_ACTIVATIONS
from moejax.kernels.grouped_matmul import grouped_matmul, tpu
from moejax.kernels.grouped_matmul.groups import LocalGroups
from tests.kernels.model_shapes import SHAPES

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.fixture(params=TOPOLOGIES)
def mesh(request, monkeypatch):
    # Without these libtpu asks the network which TPU it is on, and refuses a second process.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
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


def layout(mesh, *shape):
    """Row by row, as the kernels read and write.

    Left to itself, the compiler may choose another layout for a program's arguments and results,
    and then has to copy them.
    """
    return Format(Layout(tuple(range(len(shape)))), jax.NamedSharding(mesh, jax.P()))


def array(mesh, *shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout(mesh, *shape))


def lowered_for(mesh, function, arguments, results):
    """`results` are the shapes of what `function` returns."""
    with jax.set_mesh(mesh):
        out_shardings = tuple(layout(mesh, *shape) for shape in results)
        return jax.jit(function, out_shardings=out_shardings).lower(*arguments)


def copied_shapes(compiled) -> set[tuple[int, ...]]:
    """Shapes of all arrays that the program copies from one layout or place to another."""
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
    return {tuple(map(int, shape.split(","))) for shape in copies}


def assert_no_copies(compiled, shapes):
    assert not copied_shapes(compiled) & set(shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25  # lists of visits, not operands


def lowered_products(mesh, shape, implementation):
    """The product and both its gradients, of `shape` (rows, inner, outer, groups)."""
    rows, inner, outer, groups = shape
    shapes = (rows, inner), (groups, inner, outer), (rows, outer)
    lhs, rhs, dout = (array(mesh, *shape) for shape in shapes)

    def products(lhs, rhs, sizes, dout):
        matmul = lambda a, b: grouped_matmul(a, b, sizes, implementation=implementation)
        out, vjp = jax.vjp(matmul, lhs, rhs)
        return out, *vjp(dout)

    sizes = array(mesh, groups, dtype=jnp.int32)
    return lowered_for(mesh, products, (lhs, rhs, sizes, dout), (shapes[2], *shapes[:2])), shapes


@pytest.mark.parametrize("name", SHAPES)
def test_all_products_compile_without_copies(mesh, name):
    rows, inner, _, groups = SHAPES[name]
    lowered, shapes = lowered_products(mesh, SHAPES[name], "tpu")
    text = lowered.as_text()
    assert text.count("tpu_custom_call") >= 3
    assert f"{groups}x{rows}x{inner}" not in text
    assert_no_copies(lowered.compile(), shapes)


def lowered_glu(mesh, shape, *, activation, biased, dtype=jnp.bfloat16):
    rows, inner, outer, groups = shape
    operand = functools.partial(array, mesh, dtype=dtype)
    arguments = (
        operand(rows, inner),
        operand(groups, inner, outer),
        operand(groups, inner, outer),
        (operand(groups, outer),) * 2 if biased else None,
        array(mesh, groups, dtype=jnp.int32),
    )

    def glu(rows, gate, up, biases, sizes):
        groups = LocalGroups(sizes, 0)
        return tpu.glu(rows, gate, up, biases, groups, act=GLU_ACTIVATIONS[activation])

    return lowered_for(mesh, glu, arguments, [(rows, outer)] * 3)


@pytest.mark.parametrize("activation", ["silu", "swiglu_clamped"])
@pytest.mark.parametrize("name", SHAPES)
def test_glu_compiles_without_copies(mesh, name, activation):
    rows, inner, outer, groups = SHAPES[name]
    biased = activation == "swiglu_clamped"  # gpt-oss has both
    lowered = lowered_glu(mesh, SHAPES[name], activation=activation, biased=biased)
    assert lowered.as_text().count("@tpu_custom_call") == 1
    # In its own layout a bias is copied into one of `[G, 1, F]`: less than a millionth of the work.
    assert_no_copies(lowered.compile(), [(rows, inner), (groups, inner, outer), (rows, outer)])


@pytest.mark.parametrize("name", SHAPES)
def test_gradient_of_the_rows_of_a_glu_compiles_without_copies(mesh, name):
    rows, inner, outer, groups = SHAPES[name]
    shapes = (rows, outer), (groups, inner, outer), (rows, inner)
    dout, weight, _ = (array(mesh, *shape) for shape in shapes)

    def gradient(dgate, dup, gate, up, sizes):
        held = LocalGroups(sizes, 0)
        return (tpu.grad_rows_of_glu(dgate, dup, gate, up, held, dtype=dgate.dtype),)

    arguments = (dout, dout, weight, weight, array(mesh, groups, dtype=jnp.int32))
    assert_no_copies(lowered_for(mesh, gradient, arguments, shapes[2:]).compile(), shapes)


SMALL = (1700, 2880, 2880, 8)


@pytest.mark.parametrize("activation", GLU_ACTIVATIONS)
def test_every_activation_compiles(mesh, activation):
    lowered_glu(mesh, SMALL, activation=activation, biased=True).compile()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_everything_compiles_in_the_highest_precision(mesh, dtype):
    """As `jax.default_matmul_precision` asks for: Mosaic has it for float32 alone."""
    rows, inner, outer, groups = SMALL
    operands = (
        array(mesh, *shape, dtype=dtype) for shape in ((rows, inner), (groups, inner, outer))
    )

    def products(lhs, rhs, sizes):
        held = LocalGroups(sizes, 0)
        out = tpu.forward(lhs, rhs, held, transpose_rhs=False, dtype=dtype)
        dlhs = tpu.grad_lhs(out, rhs, held, transpose_rhs=False, dtype=dtype)
        return dlhs, tpu.grad_rhs(lhs, out, held, transpose_rhs=False, dtype=dtype)

    arguments = (*operands, array(mesh, groups, dtype=jnp.int32))
    with jax.default_matmul_precision("highest"):
        lowered_glu(mesh, SMALL, activation="silu", biased=True, dtype=dtype).compile()
        lowered_for(mesh, products, arguments, [(rows, inner), (groups, inner, outer)]).compile()


def test_a_copy_would_be_noticed(mesh):
    by_column = Format(Layout((1, 0)), jax.NamedSharding(mesh, jax.P()))
    lhs = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16, sharding=by_column)
    rhs, sizes = array(mesh, 2, 1024, 256), array(mesh, 2, dtype=jnp.int32)
    product = lambda *args: (grouped_matmul(*args, implementation="tpu"),)
    compiled = lowered_for(mesh, product, (lhs, rhs, sizes), [(512, 256)]).compile()
    with pytest.raises(AssertionError, match="512, 1024"):
        assert_no_copies(compiled, [(512, 1024)])


@pytest.mark.parametrize("rows", [4259, 4264])
def test_xlas_ragged_dot_is_not_dense_for_any_number_of_rows(mesh, rows):
    """Where it would be, dispatch must know: on most TPUs, and where 8 does not divide the rows."""
    width, groups = 512, 16
    lowered, _ = lowered_products(mesh, (rows, width, width, groups), "xla")
    useful = 3 * 2 * rows * width * width
    with jax.set_mesh(mesh):
        is_kernel = compat.has_ragged_dot()
    share = lowered.compile().cost_analysis()["flops"] / useful
    if is_kernel:
        assert share == pytest.approx(1, rel=0.05)
    else:  # one product of three, at least; all of them but for old compilers for v5p
        assert share > (groups + 2) / 3 * 0.99


def test_xlas_ragged_dot_sums_in_float32_whatever_it_returns(mesh):
    """Read in the kernel that XLA makes: bfloat16 is what it rounds to, once and at the end."""
    with jax.set_mesh(mesh):
        if not compat.has_ragged_dot():
            pytest.skip("XLA has no such kernel for this TPU")
    lowered, _ = lowered_products(mesh, (1024, 16_384, 256, 2), "xla")  # more than one tile of K
    bodies = re.findall(r'"body":"([^"]*)"', lowered.compile().as_text())
    kernels = [base64.b64decode(body).decode(errors="replace") for body in bodies]
    kernels = [kernel for kernel in kernels if "tpu.matmul" in kernel]
    assert len(kernels) == 3
    for kernel in kernels:
        matmuls = [line for line in kernel.splitlines() if "tpu.matmul" in line]
        assert all(line.rstrip().endswith("xf32>") for line in matmuls)
        assert "arith.extf" not in kernel  # nothing that was rounded is added to
