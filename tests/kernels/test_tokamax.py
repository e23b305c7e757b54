"""tokamax as an implementation: what it says where it cannot serve, and that its kernels are right.

They run where tokamax is installed, in Pallas's simulators.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import tokamax as ours
from moejax.kernels.grouped_matmul import xla
from moejax.kernels.grouped_matmul.groups import LocalGroups

PRODUCTS = ("forward", "grad_lhs", "grad_rhs")
CASES = {case.name: case for case in kit.CASES}
LEFT_OVER = CASES["rows left over"]


# What the implementation says where it cannot serve.


@pytest.fixture
def found(monkeypatch):
    """`found(platform, packages, version)`: what the implementation finds here."""

    def pretend(platform, packages=(), version="0.0.17", python=(3, 13, 0)):
        monkeypatch.setattr(compat, "target_platform", lambda: platform)
        monkeypatch.setattr(ours, "sys", types.SimpleNamespace(version_info=python))
        look = lambda name: name if name in packages else None
        monkeypatch.setattr(importlib.util, "find_spec", look)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)

    return pretend


TRITON = ("tokamax", "jax_triton", "triton")


@pytest.mark.parametrize(
    ("here", "dtype", "said"),
    [
        (("cpu", TRITON), "float32", "on cpu it would compute every group for every row"),
        (("gpu", TRITON), "float64", "computes in float32 and bfloat16, not in float64"),
        (("gpu", ()), "bfloat16", 'not installed: pip install "moejax[tokamax]"'),
        (("tpu", TRITON, "0.0.14"), "bfloat16", "tokamax 0.0.14 is too old, 0.0.17 is needed"),
        (("tpu", TRITON, "0.0.18", (3, 11, 4)), "bfloat16", "needs Python 3.12"),
        (("gpu", ("tokamax",)), "float32", "pip install jax-triton triton"),
    ],
)
def test_obstacles_say_what_to_do(found, here, dtype, said):
    found(*here)
    assert said in ours.obstacle(jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("here", "dtype"),
    [
        (("gpu", TRITON), "float32"),
        (("gpu", ("tokamax",)), "bfloat16"),
        (("tpu", ("tokamax",)), "float32"),
        (("tpu", ("tokamax",), "0.1.0rc1"), "bfloat16"),
    ],
)
def test_no_obstacle(found, here, dtype):
    found(*here)
    assert ours.obstacle(jnp.dtype(dtype)) is None


@pytest.mark.parametrize("packages", [TRITON, ("tokamax",)])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_are_named_and_the_dense_one_is_not_among_them(
    found, monkeypatch, platform, packages
):
    asked = []

    def ragged_dot_general(a, b, sizes, dims, *, implementation, **_):
        asked.append(implementation)
        return jnp.zeros((a.shape[0], b.shape[2]) if b.ndim == 3 else (4, *a.shape[1:], 64))

    library = types.SimpleNamespace(
        ragged_dot_general=ragged_dot_general, RaggedDotGroupSizes=lambda sizes, rows: sizes
    )
    monkeypatch.setitem(__import__("sys").modules, "tokamax", library)
    found(platform, packages)
    rows, rhs = jnp.zeros((8, 64)), jnp.zeros((4, 64, 64))
    groups = LocalGroups(jnp.asarray([2, 0, 3, 1]), 0)
    for product, operands in zip(PRODUCTS, ((rows, rhs), (rows, rhs), (rows, rows)), strict=True):
        getattr(ours, product)(*operands, groups, transpose_rhs=False, dtype=jnp.float32)
    kernels = {"mosaic_gpu", "triton"} if platform == "gpu" else {"mosaic_tpu"}
    kernels -= set() if "triton" in packages else {"triton"}
    assert len(asked) == 3
    assert all(isinstance(names, tuple) and set(names) == kernels for names in asked)


# The library itself.

needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None,
    reason='needs tokamax: pip install "moejax[tokamax]" (Python 3.12 or later)',
)


@contextlib.contextmanager
def aimed_at(platform, device_kind, num_cores):
    """What is traced within is meant for such a device."""
    device = jax.sharding.AbstractDevice(
        device_kind=device_kind, num_cores=num_cores, platform=platform
    )
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


aimed_at_tpu = functools.partial(aimed_at, "tpu", "TPU v5", 1)
aimed_at_hopper = functools.partial(aimed_at, "gpu", "NVIDIA H100 80GB HBM3", 132)


@contextlib.contextmanager
def simulated_tpu():
    """A TPU in Pallas's simulator, in which no race is found; memory nobody wrote is NaN there."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with aimed_at_tpu(), pltpu.force_tpu_interpret_mode(params):
        yield
    assert not simulator.races.races_found


@pytest.fixture
def hopper(monkeypatch):
    """tokamax takes this machine for one with an H100, without its Triton kernels."""
    import tokamax
    from tokamax._src import gpu_utils

    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(ours, "_has_triton", lambda: False)
    with tokamax.config.cross_compile(True), aimed_at_hopper():
        yield


@needs_tokamax
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_tpu_kernels_in_the_simulator(transpose_rhs):
    with simulated_tpu():
        assert ours.obstacle(jnp.float32) is None
        assert not kit.failures(ours, LEFT_OVER, transpose_rhs=transpose_rhs)


@needs_tokamax
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [*kit.CASES, *kit.OFFSET_CASES[::3], *kit.SHAPE_CASES],
    ids=lambda case: case.name,
)
def test_tpu_kernels_in_the_simulator_in_every_case(case):
    with simulated_tpu():
        assert not kit.failures(ours, case)
        assert not kit.failures(ours, case, dtype="bfloat16", transpose_rhs=True)


@needs_tokamax
@pytest.mark.slow
def test_tpu_kernels_by_themselves_leave_rows_of_nobody_unwritten():
    """And only that: their weight gradient selects, and gives zero to groups without rows."""
    import tokamax

    def product(a, b, groups, contract, grouped):
        dims = lax.RaggedDotDimensionNumbers((contract, ((), ())), [0], grouped)
        return tokamax.ragged_dot_general(a, b, groups.sizes, dims, implementation="mosaic_tpu")

    class Bare:
        forward = staticmethod(lambda a, b, g, **_: product(a, b, g, ((1,), (1,)), [0]))
        grad_lhs = staticmethod(lambda a, b, g, **_: product(a, b, g, ((1,), (2,)), [0]))
        grad_rhs = staticmethod(lambda a, b, g, **_: product(a, b, g, ((0,), (0,)), []))

    shape = kit.Shape(rows=384, inner=128, outer=256, held=8)  # what it takes without padding
    with simulated_tpu():
        for name in ("rows left over", "empty at the start"):
            failures = kit.failures(Bare, kit.Case(name, CASES[name].sizes, shape))
            assert {(f.product, f.what) for f in failures} == {
                (product, "rows of no group are not zero") for product in ("forward", "grad_lhs")
            }


@needs_tokamax
@pytest.mark.slow
def test_hopper_kernels_of_rows_in_the_simulator(hopper):
    """The kernel of the weight gradient cannot be simulated: it multiplies a transformed block."""

    class OfRows:
        forward, grad_lhs = staticmethod(ours.forward), staticmethod(ours.grad_lhs)
        grad_rhs = staticmethod(xla.grad_rhs)

    with compat.interpret_gpu(detect_races=True):
        assert not kit.failures(OfRows, LEFT_OVER, dtype="bfloat16")


@needs_tokamax
@pytest.mark.parametrize("shape", [(300, 40, 72, 8), (61, 13, 27, 3), (1024, 256, 128, 8)])
def test_all_products_lower_for_hopper_to_kernels(hopper, shape):
    lowered = lower_all(shape, "cuda")
    assert lowered.count("mosaic_gpu") >= 3
    assert_not_dense(lowered, shape)


@needs_tokamax
@pytest.mark.parametrize("shape", [(300, 40, 72, 8), (61, 13, 27, 3), (1536, 256, 128, 8)])
def test_all_products_lower_for_tpu_to_kernels(shape):
    with aimed_at_tpu():
        lowered = lower_all(shape, "tpu")
    assert lowered.count("tpu_custom_call") >= 3
    assert_not_dense(lowered, shape)


def lower_all(shape, platform):
    """The text of all three products in bfloat16, lowered for a machine that is not there."""
    rows, inner, outer, num_groups = shape
    array = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    options = {"transpose_rhs": False, "dtype": jnp.dtype(jnp.bfloat16)}

    def products(lhs, rhs, dout, sizes):
        groups = LocalGroups(sizes, 0)
        return (
            ours.forward(lhs, rhs, groups, **options),
            ours.grad_lhs(dout, rhs, groups, **options),
            ours.grad_rhs(lhs, dout, groups, **options),
        )

    operands = array(rows, inner), array(num_groups, inner, outer), array(rows, outer)
    sizes = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
    traced = jax.jit(products).trace(*operands, sizes)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def assert_not_dense(text, shape):
    rows, inner, outer, num_groups = shape
    assert "chlo.ragged_dot" not in text
    assert not any(f"{num_groups}x{rows}x{width}x" in text for width in (inner, outer))


@needs_tokamax
def test_what_tokamax_refuses_is_its_own_error():
    """No GPU is here: its own choice would be the dense expansion, and ours ends at an error."""
    operands = jnp.zeros((64, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), jnp.bfloat16)
    groups = LocalGroups(jnp.asarray([20, 30]), 0)
    with aimed_at_hopper(), pytest.raises((NotImplementedError, ExceptionGroup)):
        ours.forward(*operands, groups, transpose_rhs=False, dtype=jnp.bfloat16)
