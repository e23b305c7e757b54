"""The fused gate, up and activation of the TPU kernels, in Pallas's simulator of a TPU.

The simulator finds races and leaves NaN in memory that nobody wrote.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

from moejax.kernels import compat
from moejax.kernels.activations import GLU_ACTIVATIONS
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import reference, tpu
from moejax.kernels.grouped_matmul.groups import LocalGroups, local_groups
from moejax.kernels.grouped_matmul.tpu import rows as rows_file
from moejax.kernels.grouped_matmul.tpu.blocks import Blocks

CASES = {case.name: case for case in (*kit.CASES, *kit.OFFSET_CASES, *kit.SHAPE_CASES)}


def check(case, *, glu=tpu.glu, activation="swiglu_clamped", biased=True, dtype="float32"):
    with compat.interpret_tpu(detect_races=True):
        found = kit.glu_failures(glu, case, dtype=dtype, activation=activation, biased=biased)
    assert not simulator.races.races_found
    assert not found


@pytest.mark.parametrize("biased", [False, True])
def test_rows_left_over(biased):
    check(CASES["rows left over"], biased=biased)


@pytest.mark.slow
@pytest.mark.parametrize("case", kit.CASES, ids=lambda case: case.name)
def test_group_sizes(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*kit.OFFSET_CASES, *kit.SHAPE_CASES], ids=lambda case: case.name)
def test_group_offset_and_shapes(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", GLU_ACTIVATIONS)
def test_activations(activation, biased, dtype):
    for name in ("balanced", "empty in the middle", "rows left over"):
        check(CASES[name], activation=activation, biased=biased, dtype=dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_blocks_of_every_dimension_that_hang_over_the_edges(monkeypatch, dtype):
    blocks = Blocks(rows=64, inner=128, outer=128)
    monkeypatch.setattr(rows_file, "blocks_over_rows", lambda *_: blocks)
    shape = kit.Shape(rows=300, inner=200, outer=264, held=8)
    in_blocks = functools.partial(tpu.glu)  # the kit keeps compilations per function
    for name in ("rows left over", "127 rows", "no rows"):
        check(dataclasses.replace(CASES[name], shape=shape), glu=in_blocks, dtype=dtype)


def in_simulator(sizes, rows, gate, up, *, biases=None, act=GLU_ACTIVATIONS["silu"]):
    groups = LocalGroups(jnp.asarray(sizes, jnp.int32), 0)
    run = jax.jit(lambda *operands: tpu.glu(*operands, groups, act=act))
    with compat.interpret_tpu(detect_races=True):
        return run(rows, gate, up, biases)


@pytest.mark.slow
def test_the_activation_sees_rounded_pre_activations():
    """Else a backward pass, which has only the rounded ones, would recompute another h."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    exact_product = lambda gate, up: gate * up
    operands = draw(40, 24), draw(1, 24, 64), draw(1, 24, 64)
    gate, up, h = in_simulator([40], *operands, act=exact_product)
    wide = lambda x: np.asarray(x, np.float32)
    # A product of two bfloat16 is exact in float32, so h has a single rounding.
    np.testing.assert_array_equal(wide(h), wide(jnp.bfloat16(wide(gate) * wide(up))))


@pytest.mark.slow
def test_an_activation_that_is_not_zero_at_zero_leaves_rows_of_nobody_zero():
    one = jnp.ones((20, 8))
    weight = jnp.ones((2, 8, 8))
    plus_one = lambda gate, up: gate + up + 1
    _, _, h = in_simulator([3, 4], one, weight, weight, act=plus_one)
    np.testing.assert_array_equal(h[:, 0], [17] * 7 + [0] * 13)


@pytest.mark.slow
def test_an_empty_group_is_never_used():
    weight = jnp.ones((3, 8, 8)).at[1].set(jnp.nan)
    bias = jnp.ones((3, 8)).at[1].set(jnp.nan)
    for out in in_simulator([9, 0, 7], jnp.ones((20, 8)), weight, weight, biases=(bias, bias)):
        assert np.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows left over", "127 rows", "rows left over, groups from 5 on"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_the_rows(name, dtype):
    case = CASES[name]
    num_rows, inner, outer, held = dataclasses.astuple(case.shape)
    parts = list(reference.group_rows(case.sizes, case.offset or 0, held))
    used = np.zeros(num_rows, bool)
    for _, part in parts:
        used[part] = True
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    dgate, dup = (jnp.where(used[:, None], draw(num_rows, outer), jnp.nan) for _ in range(2))
    gate, up = draw(held, inner, outer), draw(held, inner, outer)

    def run(sizes):
        offset = None if case.offset is None else jnp.int32(case.offset)
        groups = local_groups(sizes, offset, held)
        return tpu.grad_rows_of_glu(dgate, dup, gate, up, groups, dtype=jnp.dtype(dtype))

    with compat.interpret_tpu(detect_races=True):
        got = np.asarray(jax.jit(run)(jnp.asarray(case.sizes, jnp.int32)), np.float64)
    assert not simulator.races.races_found
    options = {"group_offset": case.offset or 0, "transpose_rhs": True}
    want = sum(
        reference.grouped_matmul(dout, weight, case.sizes, **options)
        for dout, weight in ((dgate, gate), (dup, up))
    )
    for group, part in parts:
        error = np.linalg.norm(got[part] - want[part])
        assert error <= kit.TOLERANCE[dtype] * np.linalg.norm(want[part]), group
    assert not got[~used].any()


def test_inside_shard_map_that_checks_what_varies():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P("data"), jax.P(), jax.P("data")),
        out_specs=jax.P("data"),
        check_vma=True,
    )
    def run(rows, weight, sizes):
        rows, weight, sizes = compat.vary_alike((rows, weight, sizes))
        groups = LocalGroups(sizes, 0)
        dlhs = tpu.grad_lhs(rows, weight, groups, transpose_rhs=False, dtype=rows.dtype)
        drhs = tpu.grad_rhs(rows, dlhs, groups, transpose_rhs=False, dtype=rows.dtype)
        act = GLU_ACTIVATIONS["silu"]
        drows = tpu.grad_rows_of_glu(rows, rows, weight, weight, groups, dtype=rows.dtype)
        return *tpu.glu(rows, weight, weight, None, groups, act=act), dlhs, drhs, drows

    shapes = (
        jax.ShapeDtypeStruct((512, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 128, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((12,), jnp.int32),
    )
    lowered = run.trace(*shapes).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 4
