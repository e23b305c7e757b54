"""The least-loaded plan's Pallas kernel: in the simulator of a TPU, and by the TPU compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

from moejax.kernels import compat
from moejax.kernels.least_loaded import conformance, least_loaded_plan
from tests.kernels.test_tpu_aot import array, lowered_for
from tests.kernels.test_tpu_aot import mesh as mesh  # the fixture

QUICK = ("equal loads on one device", "forced, then displaced", "two devices")


def check(case):
    with compat.interpret_tpu(detect_races=True):
        found = list(conformance.failures("pallas", (case,)))
    assert not simulator.races.races_found
    assert not found


@pytest.mark.parametrize(
    "case", [c for c in conformance.CASES if c.name in QUICK], ids=lambda c: c.name
)
def test_equals_the_definition(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in conformance.CASES if c.name not in QUICK], ids=lambda c: c.name
)
def test_equals_the_definition_everywhere(case):
    check(case)


def test_inside_shard_map_that_checks_what_varies():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def plan(loads):
        loads = jax.lax.psum(loads[0], "expert")
        options = {"capacity": loads.sum() // 4, "min_chunk": 9, "implementation": "pallas"}
        return least_loaded_plan(loads, 4, **options)

    run = jax.jit(jax.shard_map(plan, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "target_platform", lambda: "tpu")
        traced = run.trace(jax.ShapeDtypeStruct((4, 8), jnp.int32))
    assert "@tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install libtpu",
)
@pytest.mark.parametrize("num_experts, num_devices", [(128, 8), (256, 64), (384, 8), (512, 256)])
def test_compiles(mesh, num_experts, num_devices):
    def plan(loads, capacity, min_chunk):
        options = {"capacity": capacity, "min_chunk": min_chunk, "implementation": "pallas"}
        return (least_loaded_plan(loads, num_devices, **options),)

    scalar = array(mesh, dtype=jnp.int32)
    arguments = (array(mesh, num_experts, dtype=jnp.int32), scalar, scalar)
    lowered = lowered_for(mesh, plan, arguments, [(num_experts, num_devices)])
    assert lowered.as_text().count("@tpu_custom_call") == 1
    lowered.compile()
