"""The least-loaded plan: equal to the definition bit for bit, its bound, its errors."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.errors import UserError
from moejax.kernels import accepted, compat, dispatch, least_loaded
from moejax.kernels.least_loaded import (
    IMPLEMENTATIONS,
    conformance,
    least_loaded_plan,
    reference,
)
from tests.parallel.random_loads import random_loads


@functools.partial(jax.jit, static_argnums=(0,))
def plans(num_devices, loads, capacity, min_chunk):
    """A plan for each of many loads, one after another: a loop ends when its own plan is done."""
    one = lambda x: least_loaded_plan(x[0], num_devices, capacity=x[1], min_chunk=x[2])
    return jax.lax.map(one, (loads, capacity, min_chunk))


def limits(loads, num_devices, *, seed, least_alpha=1.0):
    """Capacities of `least_alpha` to 1.5 times the mean, and chunks of 1 row to all of them."""
    rng = np.random.default_rng(seed)
    total = loads.sum(1)
    capacity = np.ceil(rng.uniform(least_alpha, 1.5, len(loads)) * total / num_devices)
    exact = -(-total // num_devices)
    capacity = np.where(rng.random(len(loads)) < 0.3, exact, capacity).astype(np.int32)
    min_chunk = (total + 1.0) ** rng.uniform(0, 1, len(loads))
    return capacity, min_chunk.astype(np.int32)


def test_the_definition_on_an_example_by_hand():
    # Devices hold 60, 22 and 8, so expert 0 gives up 30 rows: 22 fit on device 2, 8 on device 1.
    loads = [50, 10, 12, 10, 5, 3]
    plan = reference.least_loaded_plan(loads, 3, capacity=30, min_chunk=1)
    np.testing.assert_array_equal(
        plan, [[20, 8, 22], [10, 0, 0], [0, 12, 0], [0, 10, 0], [0, 0, 5], [0, 0, 3]]
    )
    # With chunks of at least 9 rows the last 8 fit on device 1, as they are all that is left.
    again = reference.least_loaded_plan(loads, 3, capacity=30, min_chunk=9)
    np.testing.assert_array_equal(plan, again)
    # With chunks of at least 23 rows all 30 are forced on device 2.
    forced = reference.least_loaded_plan(loads, 3, capacity=30, min_chunk=23)
    np.testing.assert_array_equal(forced[0], [20, 0, 30])


@pytest.mark.parametrize("num_devices, per_device", [(2, 3), (8, 1), (5, 4), (8, 4)])
def test_equals_the_definition_on_random_loads(num_devices, per_device):
    num_experts = num_devices * per_device
    loads = random_loads(700, num_experts, num_devices, most=5000, seed=num_experts)
    capacity, min_chunk = limits(loads, num_devices, seed=1, least_alpha=0.7)
    got = np.asarray(plans(num_devices, loads, capacity, min_chunk))
    want = [
        reference.least_loaded_plan(one, num_devices, capacity=c, min_chunk=m)
        for one, c, m in zip(loads, capacity.tolist(), min_chunk.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(got, want)
    displaced = [
        _displaces_after_force(*case, num_devices)
        for case in zip(got, loads, capacity, strict=True)
    ]
    assert num_devices == 2 or sum(displaced) > 5  # the hardest case is among them


def _displaces_after_force(plan, loads, capacity, num_devices) -> bool:
    """Whether a device that computes foreign rows, and had room, gave up rows of its own."""
    owner = np.arange(len(loads)) // (len(loads) // num_devices)
    native = np.bincount(owner, loads, num_devices)
    home = owner[:, None] == np.arange(num_devices)
    receives, gives = (plan * ~home).sum(0) > 0, native > (plan * home).sum(0)
    return bool((receives & gives & (native <= capacity)).any())


@pytest.mark.parametrize(
    "num_devices, per_device, most", [(8, 4, 500_000), (8, 16, 2**30), (16, 2, 60_000), (3, 5, 99)]
)
def test_no_device_exceeds_the_bound(num_devices, per_device, most):
    """10,000 loads in all, of which many need the term for chunks that are too small."""
    loads = random_loads(2500, num_devices * per_device, num_devices, most=most, seed=most)
    capacity, min_chunk = limits(loads, num_devices, seed=2)
    plan = np.asarray(plans(num_devices, loads, capacity, min_chunk), np.int64)
    np.testing.assert_array_equal(plan.sum(2), loads)
    assert plan.min() >= 0
    load, total = plan.sum(1).max(1), loads.sum(1, dtype=np.int64)
    room = num_devices * capacity.astype(np.int64) - total
    bound = capacity + np.maximum(0, (num_devices - 2) * (min_chunk.astype(np.int64) - 1) - room)
    assert (load <= bound).all()
    assert (load > capacity).mean() > 0.02


def test_small_chunks_never_exceed_the_capacity():
    loads = random_loads(500, 32, 8, most=10_000, seed=3)
    capacity, _ = limits(loads, 8, seed=3)
    plan = np.asarray(plans(8, loads, capacity, np.ones(500, np.int32)))
    assert (plan.sum(1) <= capacity[:, None]).all()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**20) | st.just(7), min_size=6, max_size=6),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(-5, 2**21),
    st.integers(-1, 2**20),
)
def test_any_limits_give_a_plan_that_is_the_definition(loads, num_devices, capacity, min_chunk):
    loads = np.asarray(loads, np.int32)
    got = plans(num_devices, loads[None], np.int32([capacity]), np.int32([min_chunk]))[0]
    want = reference.least_loaded_plan(loads, num_devices, capacity=capacity, min_chunk=min_chunk)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(want.sum(1), loads)


def test_float64_runs_make_the_same_plan():
    case = conformance.CASES[-2]
    options = {"capacity": case.capacity, "min_chunk": case.min_chunk}
    want = reference.least_loaded_plan(case.loads, case.num_devices, **options)
    with jax.enable_x64(True):
        plan = jax.jit(least_loaded_plan, static_argnums=1)
        got = plan(np.int64(case.loads), case.num_devices, **options)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("varying", ["nothing", "loads", "capacity"])
def test_inside_shard_map_that_checks_what_varies(varying):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    counts = random_loads(4, 8, 4, most=1000, seed=5)

    def plan(counts):
        summed = jax.lax.psum(counts[0], "expert")
        gathered = jax.lax.all_gather(counts, "expert", tiled=True).sum(0)
        loads = gathered if varying == "loads" else summed
        capacity = (gathered if varying == "capacity" else summed).sum() // 4 + 1
        return least_loaded_plan(loads, 4, capacity=capacity, min_chunk=9)[None]

    out = jax.P() if varying == "nothing" else jax.P("expert")
    run = jax.shard_map(plan, mesh=mesh, in_specs=jax.P("expert"), out_specs=out, check_vma=True)
    loads = counts.sum(0)
    want = reference.least_loaded_plan(loads, 4, capacity=int(loads.sum()) // 4 + 1, min_chunk=9)
    assert (want.astype(bool).sum(1) > 1).any()
    for got in jax.jit(run)(counts):
        np.testing.assert_array_equal(got, want)


def test_the_kit_passes_and_notices_a_wrong_plan(monkeypatch):
    assert not list(conformance.failures("jnp"))
    from moejax.kernels.least_loaded import jnp as module

    right = module.plan
    monkeypatch.setattr(module, "plan", lambda *args: right(*args).at[0, 0].add(1))
    found = list(conformance.failures("jnp", conformance.CASES[:2]))
    assert len(found) == 2
    assert found[0].startswith("nothing to do: plan[0, 0] is 1, and the definition says 0")


def test_experts_that_no_devices_share_evenly_are_an_error():
    with pytest.raises(ValueError, match="10 experts for 4 devices.*multiple"):
        least_loaded_plan(jnp.zeros(10, jnp.int32), 4, capacity=1, min_chunk=1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [np.zeros(8), np.zeros((2, 4), np.int32)])
def test_loads_that_are_no_counts_are_an_error(bad):
    with pytest.raises(ValueError, match="vector of integers; got"):
        least_loaded_plan(bad, 4, capacity=1, min_chunk=1)


@pytest.mark.parametrize(
    "name, what",
    [("pallas", "'pallas' cannot serve this call: it runs on TPU, and this is cpu"),
     ("fast", "no implementation 'fast'; use one of jnp, pallas")],
)  # fmt: skip
def test_a_named_implementation_serves_or_says_why_not(name, what):
    with pytest.raises(UserError, match=what):
        least_loaded_plan(jnp.ones(4, jnp.int32), 2, capacity=2, min_chunk=1, implementation=name)


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """Which implementation a call without a name traces, as if on a device of this platform."""
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))
    dispatch._announce.cache_clear()
    seen, plain = [], least_loaded.module("jnp").plan
    for name in IMPLEMENTATIONS:
        spy = lambda *args, name=name: seen.append(name) or plain(*args)
        monkeypatch.setattr(least_loaded.module(name), "plan", spy)

    def trace(platform, kind, **options):
        monkeypatch.setattr(compat, "target_platform", lambda: platform)
        monkeypatch.setattr(compat, "target_device_kind", lambda: kind)
        least_loaded_plan(jnp.ones(4, jnp.int32), 2, capacity=2, min_chunk=1, **options)
        return seen.pop()

    yield trace
    dispatch._announce.cache_clear()


def test_on_tpu_the_kernel_is_taken_once_it_was_accepted(taken, caplog):
    with caplog.at_level(logging.INFO):
        assert [taken("tpu", "TPU v5") for _ in range(3)] == ["jnp"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "least_loaded_plan (int32): implementation 'jnp' on TPU v5" in record.message
    accepted.store("TPU v5", {"least_loaded": {"int32": {"plan": "pallas"}}}, {})
    assert taken("tpu", "TPU v5") == "pallas"
    assert taken("tpu", "TPU v6 lite") == "jnp"
    assert taken("tpu", "TPU v5", implementation="jnp") == "jnp"
    assert taken("cpu", "TPU v5") == "jnp"  # it cannot serve there


@pytest.mark.parametrize("platform, kind", [("cpu", "cpu"), ("gpu", "NVIDIA H100")])
def test_elsewhere_nobody_is_told_to_accept_a_kernel(taken, caplog, platform, kind):
    with caplog.at_level(logging.INFO):
        assert taken(platform, kind) == "jnp"
    assert [record.levelno for record in caplog.records] == [logging.INFO]
