"""Every transport on several devices equals the definition on one: values, gradients, no loss."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.transport
from moejax.errors import UserError
from moejax.experts.glu import GLU
from moejax.parallel.mesh import Mesh
from moejax.transport.all_gather import AllGather
from moejax.transport.all_to_all import AllToAll
from moejax.transport.least_loaded import LeastLoaded
from moejax.transport.local import Local
from moejax.types import Routing
from tests.contract import methods
from tests.parallel.simulated import emulate_ragged
from tests.transport.routings import E, K, T, routings

D, F = 8, 12

# One slot for foreign experts makes rows wait for a second round, and so does little room.
TRANSPORTS = {
    "local": Local(),
    "all_gather": AllGather(),
    "all_to_all": AllToAll(),
    "least_loaded": LeastLoaded(min_chunk=1),
    "one slot": LeastLoaded(min_chunk=1, num_slots=1, skip_below=1.0, alpha=1.0),
    "in rounds": LeastLoaded(min_chunk=1, num_slots=1, room=0.7),
    "ragged": LeastLoaded(min_chunk=1, exchange="ragged"),
}
# With 16 experts each owner has 2, 4 and 8. Four slots suffice for one round but on the last mesh.
MESHES = {
    "expert=8": Mesh(expert=8),
    "expert=4 data=2": Mesh(expert=4, data=2),
    "expert=2 fsdp=2 tensor=2": Mesh(expert=2, fsdp=2, tensor=2),
}
ON_MESHES = {
    "expert=8": ("all_gather", "all_to_all", "least_loaded", "in rounds"),
    "expert=4 data=2": ("least_loaded", "ragged", "one slot", "in rounds"),
    "expert=2 fsdp=2 tensor=2": ("local", "all_gather", "all_to_all", "least_loaded", "one slot"),
}
CASES = [(name, shape) for shape, names in ON_MESHES.items() for name in names]
# Once each; the others take minutes together.
QUICK = {("all_gather", "expert=8"), ("all_to_all", "expert=8"), ("least_loaded", "expert=8")}
QUICK |= {("one slot", "expert=4 data=2"), ("ragged", "expert=4 data=2")}
QUICK |= {("local", "expert=2 fsdp=2 tensor=2"), ("in rounds", "expert=4 data=2")}
MARKED = [
    pytest.param(*case, marks=pytest.mark.slow if case in QUICK else pytest.mark.long)
    for case in CASES
]


def test_every_transport_is_here():
    assert {name for name, _ in CASES} == TRANSPORTS.keys()
    here = {type(transport) for transport in TRANSPORTS.values()}
    assert {type(found.values[0]) for found in methods(moejax.transport)} <= here


@functools.cache
def weights_axes_and_compute(implementation=None):
    layer = GLU(d_ff=F, use_bias=True, implementation=implementation)
    variables = layer.init(jax.random.key(0), E, D)
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda w: rng.standard_normal(w.shape), variables)
    return layer.apply(random, E, D)


def values_and_gradients(apply):
    """(x, experts, gate, weights, dy) -> (y, gradients, counts) of `apply`, to be jitted once."""

    def both(x, experts, gate, weights, dy):
        y, vjp, counts = jax.vjp(
            lambda x, gate, w: apply(x, experts, gate, w), x, gate, weights, has_aux=True
        )
        return y, vjp(dy), counts

    return jax.jit(both)


def through(transport):
    _, axes, compute = weights_axes_and_compute()

    def apply(x, experts, gate, weights):
        unused = jnp.zeros((T, E))
        routing = Routing(experts=experts, weights=gate, probs=unused, logits=unused, extras={})
        return transport(x, routing, weights, compute, axes=axes)

    return values_and_gradients(apply)


def by_definition():
    """Every expert on every token, on one device and without a transport."""
    _, _, compute = weights_axes_and_compute("reference")
    return values_and_gradients(lambda *operands: (compute(*operands), {}))


def on_all_routings(run, dtype):
    """{routing: (y, gradients, counts)}: routings are values, so one program serves them all."""
    found = {}
    for kind, experts in routings().items():
        rng = np.random.default_rng(0)
        x, dy = rng.standard_normal((2, T, D))
        gate = np.where(experts < E, rng.random((T, K)), 0)
        floats = jax.tree.map(
            lambda v: np.asarray(v, dtype), (x, gate, weights_axes_and_compute()[0], dy)
        )
        x, gate, weights, dy = floats
        found[kind] = jax.device_get(run(x, experts, gate, weights, dy))
    return found


@functools.cache
def on_one_device():
    with jax.enable_x64(True):
        return on_all_routings(by_definition(), np.float64)


def on_mesh(name: str, shape: str, dtype: str):
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == "float64"))
        stack.enter_context(jax.set_mesh(MESHES[shape].build()))
        if name == "ragged":
            emulate_ragged(stack.enter_context(pytest.MonkeyPatch.context()))
        return on_all_routings(through(TRANSPORTS[name]), dtype)


def worst_error(found, expected) -> float:
    """The largest error of any expert of any tensor, relative to the largest entry there."""
    errors = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (v.reshape(E, -1) if v.shape[0] == E else v.reshape(1, -1) for v in (a, b))
        scale = np.abs(b).max(axis=1)
        errors.append(np.max(np.abs(a - b).max(axis=1) / np.where(scale > 0, scale, 1)))
    return np.max(errors)  # NaN if any is


def check(name, shape, dtype, tolerance):
    """Returns the transport's counts, {routing: counts}."""
    expected, results = on_one_device(), on_mesh(name, shape, dtype)
    for kind, (*found, counts) in results.items():
        assert counts["dropped"] == 0, kind
        assert {v.dtype.name for v in jax.tree.leaves(found)} == {dtype}
        assert worst_error(found, expected[kind][:2]) < tolerance, kind
    return {kind: counts for kind, (*_, counts) in results.items()}


@pytest.mark.parametrize(("name", "shape"), MARKED)
def test_equals_the_definition_whatever_the_routing(name, shape):
    counts = check(name, shape, "float64", 1e-9)
    if isinstance(TRANSPORTS[name], LeastLoaded):  # and on every path
        assert counts["one hot expert"]["foreign_experts"] > 0
        assert counts["no choices"]["foreign_experts"] == 0
        extra_rounds = [c["extra_rounds"] for c in counts.values()]
        assert min(extra_rounds) == 0
        assert (max(extra_rounds) > 0) == (name in ("one slot", "in rounds"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["all_gather", "all_to_all", "one slot"])
def test_equals_the_definition_in_float32(name):
    check(name, "expert=2 fsdp=2 tensor=2", "float32", 1e-5)


def test_all_gather_adds_over_devices_in_float32():
    """Results and, going back, gradients of tokens: in bfloat16 each device would round anew."""
    half = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    experts = next(iter(routings().values()))
    operands = (half(np.ones((T, D))), experts, half(np.ones((T, K))))
    weights = jax.tree.map(half, weights_axes_and_compute()[0])
    with jax.set_mesh(MESHES["expert=4 data=2"].build()):
        run = jax.make_jaxpr(through(AllGather()))
        program = str(run(*operands, weights, half(np.ones((T, D)))))
    added = [line for line in program.splitlines() if " reduce_scatter[" in line]
    assert len(added) == 3  # y, and the gradients of x and of the weights of the choices
    assert all("f32[" in line.split(" = ")[0] for line in added), added


def test_experts_that_do_not_divide_over_the_axis_are_an_error():
    odd = jax.tree.map(lambda w: jnp.asarray(w[:6]), weights_axes_and_compute()[0])
    _, axes, compute = weights_axes_and_compute()
    unused = jnp.zeros((T, 6))
    routing = Routing(
        experts=jnp.zeros((T, K), jnp.int32),
        weights=jnp.zeros((T, K)),
        probs=unused,
        logits=unused,
        extras={},
    )
    with (
        jax.set_mesh(Mesh(data=2, expert=4).build()),
        pytest.raises(UserError, match=r"mesh.expert=4 does not divide the 6 .* 'expert'"),
    ):
        AllToAll()(jnp.zeros((T, D)), routing, odd, compute, axes=axes)


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", 0.9), ("skip_below", 0.5), ("min_chunk", 0), ("num_slots", 0)]
)
def test_settings_that_no_plan_can_keep_are_errors(field, value):
    with pytest.raises(UserError, match=f"transport.{field}={value} must be at least 1"):
        LeastLoaded(**{field: value})


def test_room_must_be_above_zero():
    with pytest.raises(UserError, match="transport.room=0.0 must be above 0"):
        LeastLoaded(room=0.0)
